"""Specs of jobs, sweeps and tasks that were changed: each is read as what it says, or refused with a short reason."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from multitask.spec.errors import SpecError
from multitask.spec.reading import dump_spec, dump_yaml, load_spec, load_task
from multitask.spec.schema import JobSpec
from multitask.spec.text import read_yaml, to_yaml
from multitask.sweep.plan import plan_trials, settings
from multitask.sweep.spec import dump_sweep, load_sweep
from tests.fuzz.harness import fuzz
from tests.fuzz.specs import has_a_key_twice, spec_file

TASK = {
    "name": "pets",
    "data": "data/pets",
    "method": "scale_bias",
    "resolution": 16,
    "options": {"statistics": "source"},
}
JOB = {
    "name": "job",
    "backbone": {"name": "mobilenet_v2", "num_classes": 5, "options": {"dropout": 0.1, "last_channel": 16}},
    "task_defaults": {"batch_size": 8, "num_classes": 3, "mean": [0.5, 0.5, 0.5], "labels": {"zone": "west"}},
    "tasks": [
        TASK,
        {**TASK, "name": "cars", "method": "last_layer", "resolution": [16, 24], "resources": {"disk": 0.5}},
    ],
    "train_shared": True,
    "steps": 20,
    "evaluate_every": 10,
    "optimizer": {"name": "rmsprop", "weight_decay": 0.0001},
    "schedule": {"every_rounds": 7},
    "engine": {"name": "bounded", "staleness": 3, "in_flight": 1},
    "checkpoints": {"every_minutes": None, "every_rounds": 5},
    "resources": {"gpus_per_worker": 0.5},
    "tracking": {"uri": "http://127.0.0.1:5000"},
    "seed": 3,
}
SWEEP = {
    "name": "rates",
    "job": {key: value for key, value in JOB.items() if key not in ("name", "optimizer")},
    "space": {
        "optimizer": {"choice": [{"name": "sgd", "rate": 0.1}, {"name": "adamw", "rate": 0.01}]},
        "tasks.pets.batch_size": {"grid": [4, 8]},
        "clip_norm": {"log_uniform": [0.1, 1]},
    },
    "ready": ["mist_k"],
    "samples": 2,
    "repeats": 2,
    "scheduler": {"name": "asha", "grace_rounds": 10},
    "source": "./source.yaml",
    "retries": 2,
    "seed": 1,
}


def values(tree: Any) -> Iterator[Any]:
    """Yield every value of plain data that is no list and no mapping."""
    for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from values(inner)
    if not isinstance(tree, dict | list):
        yield tree


def check(spec: JobSpec) -> None:
    """Fail unless a spec can be kept and read again, and its numbers are ones that training can use."""
    content = dump_spec(spec)
    assert all(math.isfinite(value) for value in values(content) if isinstance(value, float))
    assert "\0" not in "".join(value for value in values(content) if isinstance(value, str))
    assert type(spec.steps) is type(spec.evaluate_every) is type(spec.seed) is int
    assert min(spec.steps, spec.evaluate_every) >= 1
    assert spec.optimizer.rate > 0
    assert len({task.name for task in spec.tasks}) == len(spec.tasks) >= 1
    for task in spec.tasks:
        assert len(task.mean) == len(task.std) == 3
        assert 0 <= min(task.mean) <= max(task.mean) <= 1
        assert 0 < min(task.std) <= max(task.std) <= 1
        assert 8 <= task.resolution <= 8192
        assert 1 <= task.needed_workers <= task.workers
    assert load_spec(content) == spec


def reread(text: str, path: Path) -> Any:
    again = path.with_suffix(".again")
    again.write_bytes(text.encode())
    return read_yaml(again)


def read_job_file(path: Path) -> None:
    spec = load_spec(path)
    check(spec)
    assert reread(dump_yaml(spec), path) == dump_spec(spec)


def read_sweep_file(path: Path) -> None:
    sweep = load_sweep(path)
    assert reread(to_yaml(dump_sweep(sweep)), path) == dump_sweep(sweep)
    assert load_sweep(dump_sweep(sweep)) == sweep
    if sweep.repeats * len(settings(dataclasses.replace(sweep, samples=1))) <= 20:
        for plan in plan_trials(dataclasses.replace(sweep, samples=1)):
            check(plan.spec)


def read_task_file(path: Path) -> None:
    task = load_task(path)
    assert load_spec({**JOB, "tasks": [task], "task_defaults": None, "optimizer": {"name": "sgd", "rate": 1}}).tasks


READERS = {"job": (JOB, read_job_file), "sweep": (SWEEP, read_sweep_file), "task": (TASK, read_task_file)}


@pytest.mark.parametrize("kind", READERS)
def test_a_spec_is_read_as_it_stands_or_refused(kind: str, tmp_path: Path) -> None:
    whole, reader = READERS[kind]
    path = tmp_path / "spec.yaml"

    def make(random: Random) -> bytes:
        data = spec_file(random, whole)
        path.write_bytes(data)
        return data

    def read(data: bytes) -> None:
        reader(path)
        assert not has_a_key_twice(data), "a key that stands twice was taken"

    fuzz(f"specs of a {kind}", 30, (SpecError,), make, read)
