"""Checkpoints that are damaged, and folders of checkpoints that cannot be read or written."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from multitask.errors import TrainingError
from multitask.job import writing
from multitask.job.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from multitask.job.job import Job
from multitask.job.room import check_room, checkpoint_bytes, version_bytes
from multitask.server.progress import Progress, WorkerProgress
from multitask.spec.errors import SpecError
from multitask.spec.schema import JobSpec
from tests.conftest import run_engine, store_of
from tests.disk import full_disk

MakeSpec = Callable[..., JobSpec]
TENSORS = {"values/backbone/weight": torch.ones(9), "scalars/step/backbone/weight": torch.tensor(3.0)}
PROGRESS = Progress(
    version=7, rounds=Fraction(7, 2), workers={"pets/0": WorkerProgress(step=3)}, first_round={"pets": 0}
)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """A store with two checkpoints."""
    store = CheckpointStore(str(tmp_path / "checkpoints"), keep=2)
    store.save(Checkpoint(replace(PROGRESS, version=6), TENSORS))
    store.save(Checkpoint(PROGRESS, TENSORS))
    return store


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / "checkpoint-000001.safetensors"


def rewrite(path: Path, change: Callable[[dict[str, str]], Any]) -> None:
    """Change the metadata of a checkpoint, as someone would who knows the format. Its digest goes."""
    content = path.read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    del metadata["sha256"]
    change(metadata)
    path.write_bytes(save(load(content), metadata))


def progress_with(**changes: Any) -> str:
    return json.dumps(PROGRESS.to_json() | changes)


DAMAGED = {
    "no JSON": "{",
    "a list": "[]",
    "nested too deep": "[" * 100_000,
    "no keys": "{}",
    "a key more": progress_with(pushes=3),
    "a key less": json.dumps({key: value for key, value in PROGRESS.to_json().items() if key != "version"}),
    "text for a number": progress_with(version="7"),
    "below zero": progress_with(version=-7),
    "a float": progress_with(rejected_calls=1.5),
    "no fraction": progress_with(rounds="one"),
    "divided by zero": progress_with(rounds="7/0"),
    "a fraction that fills the memory": progress_with(rounds="1e999999999"),
    "no workers": progress_with(workers=None),
    "a worker that is a number": progress_with(workers={"pets/0": 3}),
    "a worker without its keys": progress_with(workers={"pets/0": {"step": 3}}),
    "not a number": progress_with(best_top1=float("nan")),
}


@pytest.mark.parametrize("progress", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_checkpoint_with_damaged_progress_is_passed_over(
    store: CheckpointStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, progress: str
) -> None:
    rewrite(newest(tmp_path), lambda metadata: metadata.update(progress=progress))

    with caplog.at_level(logging.WARNING):
        found = store.latest()

    assert found is not None
    assert found.progress.version == 6
    (message,) = (record.getMessage() for record in caplog.records)
    assert str(newest(tmp_path)) in message
    assert len(message) < 1000


def test_a_checkpoint_whose_numbers_have_changed_is_passed_over(store: CheckpointStore, tmp_path: Path) -> None:
    path = newest(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last byte of a tensor
    path.write_bytes(content)

    found = store.latest()

    assert found is not None
    assert found.progress.version == 6


def test_a_checkpoint_without_a_digest_is_read_because_version_0_1_wrote_none(
    store: CheckpointStore, tmp_path: Path
) -> None:
    rewrite(newest(tmp_path), dict)
    found = store.latest()
    assert found is not None
    assert found.progress == PROGRESS


def test_what_is_no_file_is_passed_over(store: CheckpointStore, tmp_path: Path) -> None:
    newest(tmp_path).unlink()
    os.mkfifo(newest(tmp_path))
    (newest(tmp_path).parent / "checkpoint-000002.safetensors").mkdir()

    found = store.latest()

    assert found is not None
    assert found.progress.version == 6


def test_a_file_in_the_folders_place_is_named(store: CheckpointStore, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_bytes(b"")
    for read in (store.latest, store.where):
        with pytest.raises(
            CheckpointError, match=r"/checkpoints: expected a folder of checkpoints.*put the folder back"
        ):
            read()


def test_a_checkpoint_of_another_job_is_refused_by_the_shape_that_differs(make_spec: MakeSpec) -> None:
    job = Job(make_spec(steps=1, checkpoints={"every_rounds": 1}))
    run_engine(job)
    checkpoint = store_of(job).latest()
    assert checkpoint is not None
    name = next(name for name in checkpoint.tensors if name.startswith("values/tasks/pets/") and "bias" in name)
    other = Checkpoint(checkpoint.progress, {**checkpoint.tensors, name: torch.zeros(3, 5)})
    with pytest.raises(CheckpointError, match=rf"shape \(3, 5\) for '{name}', and the job has .*spec\.yaml"):
        Job(job.spec, other)


# Disks that are full.


def test_room_that_somebody_makes_in_time_saves_the_run(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waits: list[float] = []
    before = sorted(os.listdir(tmp_path / "checkpoints"))
    with full_disk(1000):
        monkeypatch.setattr(writing.time, "sleep", waits.append)
        monkeypatch.setattr("multitask.job.writing.WAITS_S", (0.5, 2.0))
        with pytest.raises(TrainingError, match=r"checkpoints' cannot be written: .*needs at least 40,\d+ bytes"):
            store.save(Checkpoint(PROGRESS, {"values/backbone/weight": torch.ones(10_000)}))
    assert waits == [0.5, 2.0]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == before
    warnings = [record.getMessage() for record in caplog.records]
    assert ["tried again in 0.5 s" in warnings[0], "tried again in 2 s" in warnings[1]] == [True, True]

    assert store.save(Checkpoint(PROGRESS, TENSORS)).endswith("checkpoint-000002.safetensors")


def test_a_disk_without_room_for_the_run_is_refused_before_training(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(make_spec(steps=1, checkpoints={"every_rounds": 1, "keep": 2}))
    run_engine(job)
    checkpoint = store_of(job).latest()
    assert checkpoint is not None
    # A flat buffer has gaps between its tensors.
    tensors = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert 0.8 * tensors < checkpoint_bytes(job) < 1.5 * tensors
    needed = 3 * checkpoint_bytes(job) + 3 * version_bytes(job)

    replaced = sum(path.stat().st_size for path in job.spec.run_directory.rglob("*") if path.is_file())
    assert replaced > 0
    asked: list[Path] = []

    def free(size: int) -> None:
        def usage(path: Path) -> SimpleNamespace:
            asked.append(path)
            return SimpleNamespace(free=size)

        monkeypatch.setattr("multitask.job.room.shutil.disk_usage", usage)

    free(needed - replaced)
    check_room(job)
    assert asked == [job.spec.run_directory, Path(job.spec.checkpoint_folder)]  # each may be a disk of its own
    free(needed - replaced - 1)
    with pytest.raises(SpecError, match=r"GB on this disk, and .* GB are free\. Make room"):
        check_room(job)
