"""Damaged files of a run: a damaged checkpoint is passed over, every other file is refused by name or is whole."""

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from multitask.job.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from multitask.run.directory import Run, RunError, read_about, write_json, write_spec, write_version
from multitask.run.live import LiveStatus, read_status
from multitask.server.progress import Progress, WorkerProgress
from multitask.spec.errors import SpecError
from multitask.spec.schema import JobSpec
from tests.fuzz.damage import damaged, rewritten
from tests.fuzz.harness import fuzz

REFUSALS = (RunError, SpecError, CheckpointError)


class PassedOverError(Exception):
    """A damaged checkpoint was passed over. The counts have it among the files that were refused."""


def fuzz_file(kind: str, path: Path, read: Callable[[], object], change: Callable[[Random, bytes], bytes]) -> None:
    """Read many damaged files in the place of a whole one. An error has to name the folder of the file.

    Args:
        kind: name of the files in the counts.
        read: reads the file. It raises `PassedOverError` if an older checkpoint was read instead.
        change: makes another content from that of the whole file.
    """
    whole = path.read_bytes()
    read()

    def make(random: Random) -> bytes:
        data = change(random, whole)
        path.write_bytes(data)
        return data

    def read_damaged(_: bytes) -> None:
        try:
            read()
        except REFUSALS as refused:
            if str(path.parent) not in str(refused):
                raise AssertionError(f"the message names no file: {refused}") from refused
            raise

    fuzz(kind, 60, (*REFUSALS, PassedOverError), make, read_damaged)


def damaged_or_rewritten(random: Random, text: bytes) -> bytes:
    """Return another content for a JSON file: with other bytes, or with other values and keys."""
    return random.choice((damaged, rewritten))(random, text)


PROGRESS = Progress(
    version=7,
    rounds=Fraction(7, 2),
    workers={"pets/0": WorkerProgress(step=3), "cars/0": WorkerProgress(step=4)},
    first_round={"pets": 0, "cars": 1},
    best_top1=50.0,
)
TENSORS = {"values/backbone/weight": torch.arange(9.0), "scalars/step/backbone/weight": torch.tensor(3.0)}


def with_metadata(content: bytes, change: Callable[[dict[str, str]], dict[str, Any]]) -> bytes:
    """Change the metadata in the header of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    text = json.dumps({**header, "__metadata__": change(header["__metadata__"])}).encode()
    return len(text).to_bytes(8, "little") + text + content[end:]


def test_checkpoints_whose_bytes_are_damaged_are_passed_over(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), keep=2)
    store.save(Checkpoint(replace(PROGRESS, version=6), TENSORS))
    path = Path(store.save(Checkpoint(PROGRESS, TENSORS)))

    def read() -> None:
        found = store.latest()
        assert found is not None
        assert found.progress in (PROGRESS, replace(PROGRESS, version=6)), "other counters than were saved"
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in TENSORS.items()), "other values"
        if found.progress.version == 6:
            raise PassedOverError

    fuzz_file("checkpoints, bytes", path, read, damaged)


def test_checkpoints_whose_progress_was_edited_are_passed_over(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), keep=2)
    store.save(Checkpoint(replace(PROGRESS, version=6), TENSORS))
    path = Path(store.save(Checkpoint(PROGRESS, TENSORS)))

    def change(random: Random, content: bytes) -> bytes:
        def without_digest(metadata: dict[str, str]) -> dict[str, Any]:
            progress = damaged_or_rewritten(random, metadata["progress"].encode())
            return {"format": metadata["format"], "progress": progress.decode("utf-8", "surrogateescape")}

        return with_metadata(content, without_digest)

    def read() -> None:
        found = store.latest()
        assert found is not None
        assert type(found.progress.version) is int
        assert found.progress.with_workers({"pets/0": "pets"}).rounds >= 0
        if found.progress.version == 6:
            raise PassedOverError

    fuzz_file("checkpoints, progress", path, read, change)


STATUS = {
    "name": "job",
    "state": "stopped",
    "error": None,
    "engine": "local",
    "mlflow_run_id": "f00d",
    "rejected_calls": 0,
    "tasks": {
        "pets": {
            "steps": 8,
            "made": 4,
            "pushes": 4,
            "staleness": 0,
            "redone": 0,
            "lost": 0,
            "rejected": 0,
            "skipped": 1,
            "bad_images": ["row 3"],
            "processes": {"pets/0": 4711},
            "curve": [{"step": 2, "version": 4, "top1": 50.0, "top5": 90.0, "loss": 1.5}],
            "latest": {"loss": 1.0, "rate": 0.1, "staleness": 0, "samples_per_s": 99.5},
        }
    },
}


def test_damaged_statuses_are_refused_by_name(tmp_path: Path) -> None:
    LiveStatus(tmp_path).write(STATUS, now=True)

    def read() -> None:
        status = read_status(tmp_path)
        json.dumps(status, ensure_ascii=False).encode()
        assert all(task["made"] >= 0 for task in status["tasks"].values())

    fuzz_file("status.json", tmp_path / "status.json", read, damaged_or_rewritten)


@pytest.fixture
def run_directory(make_spec: Callable[..., JobSpec], tmp_path: Path) -> Path:
    """The directory of a finished run whose models nobody loads."""
    metrics = {"pets": {"top1": 50.0, "top5": 90.0, "loss": 1.5}}
    version = {"version": 8, "round": 8, "tasks": metrics}
    numbers = {"engine": "local", "parameters": 9, "trained_parameters": 9, "seconds": 1.5, "mlflow_run_id": "f00d"}
    write_spec(tmp_path / "spec.yaml", make_spec())
    write_json(
        tmp_path / "result.json", {"last": version, "best": version, **numbers, "tasks": {"pets": {"pushes": 4}}}
    )
    write_version(tmp_path / "best.safetensors", TENSORS, {}, version)
    return tmp_path


def test_damaged_results_are_refused_by_name(run_directory: Path) -> None:
    def read() -> None:
        result = Run(run_directory).result
        assert all(task["top1"] is not None for task in result["best"]["tasks"].values())

    fuzz_file("result.json", run_directory / "result.json", read, damaged_or_rewritten)


def test_damaged_facts_of_a_version_are_refused_by_name(run_directory: Path) -> None:
    path = run_directory / "best.safetensors"

    def change(random: Random, content: bytes) -> bytes:
        if random.random() < 0.5:
            return damaged(random, content)
        return with_metadata(
            content, lambda found: {"about": damaged_or_rewritten(random, found["about"].encode()).decode("latin-1")}
        )

    def read() -> None:
        assert read_about(path)["tasks"] is not None

    fuzz_file("best.safetensors", path, read, change)


def test_damaged_specs_of_a_run_are_refused_by_name(run_directory: Path) -> None:
    def read() -> None:
        assert Run(run_directory).spec.tasks

    fuzz_file("spec.yaml", run_directory / "spec.yaml", read, damaged)
