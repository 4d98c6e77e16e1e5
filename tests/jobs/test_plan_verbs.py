"""`multitask plan` as a user sees it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from multitask.capacity import timing as pace
from multitask.capacity.estimate import Kind
from multitask.job.job import Job
from multitask.spec.reading import dump_spec
from multitask.spec.schema import JobSpec
from tests.jobs.command import multitask

MakeSpec = Callable[..., JobSpec]
FIGURES = Path(__file__).parents[2] / "benchmarks" / "results" / "server_throughput_2cpu_2026-11-22.json"


@pytest.fixture
def write_spec(make_spec: MakeSpec, tmp_path: Path) -> Callable[..., Path]:
    def write(tasks: dict[str, dict[str, Any]] | None = None, **changes: Any) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(dump_spec(make_spec(tasks, **{"engine": {"name": "async"}} | changes))))
        return path

    return write


def test_a_plan_reaches_from_the_spec_to_a_thousand_workers(write_spec: Callable[..., Path]) -> None:
    spec = write_spec({"pets": {}, "cars": {"resolution": 12}}, engine={"name": "sync"})

    done = multitask("plan", spec, "--nodes", 2, "--cpus-per-node", 4, "--json")

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [kind["tasks"] for kind in found["kinds"]] == [["pets"], ["cars"]]
    assert all(kind["step_s"] > 0 and kind["cpu_s"] > 0 and kind["images"] == 8 for kind in found["kinds"])
    assert found["cluster"]["cores"] == 4
    estimates = found["estimates"]
    assert [one["workers"] for one in estimates] == [2**number for number in range(1, 11)]
    assert [one["nodes"] for one in estimates] == [one["workers"] for one in estimates]
    assert estimates[0]["images_per_s"] == pytest.approx(16 / estimates[0]["steps_s"][0])
    assert found["steps"] == 8, "of two workers, 4 each"
    for one in estimates:
        assert one["hours"] == pytest.approx(8 / one["workers"] * max(one["steps_s"]) / 3600)
    # Steps take milliseconds, so a thousand workers push more than one shard can handle.
    assert estimates[-1]["limit"] == found["saturation"]["limit"] == "the server's shards"


def test_a_plan_says_in_words_where_the_job_ends_to_grow(write_spec: Callable[..., Path]) -> None:
    done = multitask("plan", write_spec(), "--nodes", 2, "--figures", FIGURES)

    assert done.returncode == 0, done.stderr
    assert "pets" in done.stdout
    assert "times as long because of the server's shards" in done.stdout
    assert "More shards do not help" in done.stdout, "a push of next to no bytes costs every shard the same"


def test_several_workers_of_a_task_push_its_private_tensors_too(write_spec: Callable[..., Path]) -> None:
    one, two = (
        json.loads(multitask("plan", write_spec(workers=3), "--nodes", 4, "--workers", count, "--json").stdout)
        for count in (1, 2)
    )
    assert one["kinds"][0]["pushed_bytes"] < two["kinds"][0]["pushed_bytes"]
    assert one["kinds"][0]["trained_bytes"] == two["kinds"][0]["pushed_bytes"]
    assert sum(kind["workers"] for kind in two["kinds"]) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": {"name": "local"}}, "engine.name is 'local'"),
        ({"resources": {"gpus_per_worker": 1}}, "torch finds no GPU here"),
    ],
)
def test_what_cannot_be_planned_is_said_before_anything_is_timed(
    write_spec: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(pace, "Job", lambda _: pytest.fail("a job was built"))
    refused = multitask("plan", write_spec(**changes), "--nodes", 2)
    assert refused.returncode == 1
    assert message in refused.stderr


def test_tasks_that_differ_in_their_name_alone_are_timed_once(
    make_spec: MakeSpec, data_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []

    def note(_: Job, worker: str) -> tuple[list[float], float]:
        timed.append(worker)
        return [1.0, 2.0], 1.5

    monkeypatch.setattr(pace, "time_steps", note)
    tasks = {"pets": {}, "cars": {"data": data_folders["pets"]}, "food": {"resolution": 12}}
    kinds = pace.time_kinds(Job(make_spec(tasks)), at_once=1)

    assert [kind.tasks for kind in kinds] == [("pets", "cars"), ("food",)]
    assert timed == ["pets/0", "food/0"]
    assert [(kind.step_s, kind.workers) for kind in kinds] == [(1.5, 2), (1.5, 1)]


def test_workers_at_once_are_timed_in_processes_of_their_own(make_spec: MakeSpec) -> None:
    (kind,) = pace.time_kinds(Job(make_spec({"pets": {}})), at_once=2)
    assert kind.step_s > 0
    assert kind.workers == 1, "how many are timed says nothing of how many train"


def test_a_machine_that_slows_down_is_no_spread_between_workers() -> None:
    drift = np.linspace(1.0, 2.0, 201)
    noise = np.random.default_rng(0).normal(0.0, 0.1, (4, 201))
    assert pace.spread([drift.tolist()]) < 0.005
    assert pace.spread((drift + noise).tolist()) == pytest.approx(0.1, rel=0.1)


def test_a_timed_step_leaves_no_cache(make_spec: MakeSpec, tmp_path: Path) -> None:
    cached = {"method": "last_layer", "cache_features": str(tmp_path / "features")}
    spec = make_spec({"pets": cached}, train_shared=False, engine={"name": "async"})

    layout = pace.time_deployment(spec, nodes=2, cores=2, network_gbit=10)

    assert layout.kinds[0].step_s > 0
    assert not (tmp_path / "features").exists()


def test_the_whole_job_takes_hours_and_less_with_more_workers(
    write_spec: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A step of 3 s: 4,800 steps of each of the spec's two workers take 4 h, and half of that with four.
    monkeypatch.setattr(pace, "time_kinds", lambda *_, **__: (Kind(("pets",), 4, 8, 3.0, 0.0, 0.1, 10, 10),))
    spec = write_spec({"pets": {"workers": 2}}, steps=4800)

    shown = multitask("plan", spec, "--nodes", 4, "--cpus-per-node", 4, "--workers", 4).stdout

    (row,) = [line for line in shown.splitlines() if line.startswith("4 ")]
    assert " 2 h 1 min" in row  # the server takes a little of each step
    assert "the 9,600 steps of the spec's workers" in shown
