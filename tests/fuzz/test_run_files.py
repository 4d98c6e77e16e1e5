"""Damaged files of a run: a damaged checkpoint is passed over, every other file is refused by name, or is still whole.

`FUZZ_CASES=20000 python -m pytest tests/fuzz/test_run_files.py -s` tries as many files of each kind and prints counts.
"""

import json
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from multitask.job.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from multitask.run.directory import Run, RunError, read_about, write_json, write_spec, write_version
from multitask.run.live import LiveStatus, read_status
from multitask.server.progress import Progress, WorkerProgress
from multitask.spec.errors import SpecError
from multitask.spec.schema import JobSpec
from tests.fuzz import cases, is_long

CASES = cases(150)
SECONDS, BYTES, CHARS = 1.0, 300e6, 1000
"""What one small file may cost at most, and how long a message may be."""
LONG, HALF_A_PAIR = "x" * 5000, "\ud800"
VALUES: list[Any] = [None, True, -1, 0, 10**12, 10**400, 1.5, float("nan"), "", "7", HALF_A_PAIR, LONG, [], {}, [[]]]


@dataclass
class Counts:
    """What became of the files of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0

    def add(self, outcome: str, seconds: float) -> None:
        self.outcomes[outcome] += 1
        self.slowest_s = max(self.slowest_s, seconds)


def cut_or_flipped(content: bytes, chance: random.Random) -> bytes:
    """Cut a file off, flip some of its bits, or put other bytes into it."""
    place = chance.randrange(len(content))
    match chance.randrange(4):
        case 0:
            return content[:place]
        case 1:
            changed = bytearray(content)
            for _ in range(chance.randint(1, 8)):
                changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
            return bytes(changed)
        case 2:
            return content[:place] + chance.randbytes(chance.randint(1, 16)) + content[place:]
        case _:
            return content[:place] + content[place + chance.randint(1, 16) :]


def edited(content: Any, chance: random.Random) -> Any:
    """Change one value or key somewhere in plain data, as someone would who knows the format."""
    if isinstance(content, dict) and content and chance.random() < 0.9:
        key = chance.choice(list(content))
        match chance.randrange(8):
            case 0:
                return {name: value for name, value in content.items() if name != key}
            case 1:
                return {**content, chance.choice(["more", LONG, HALF_A_PAIR]): content[key]}
            case _:
                return {**content, key: edited(content[key], chance)}
    if isinstance(content, list) and content and chance.random() < 0.9:
        place = chance.randrange(len(content))
        return [*content[:place], edited(content[place], chance), *content[place + 1 :]]
    return chance.choice(VALUES)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Return another content for a JSON file."""
    match chance.randrange(12):
        case 0:
            return chance.choice([b"[", b'{"a":']) * chance.choice([100, 100_000])
        case 1 | 2 | 3 | 4:
            return cut_or_flipped(content, chance)
        case _:
            return json.dumps(edited(json.loads(content), chance)).encode()


def fuzz(name: str, path: Path, read: Callable[[], object], change: Callable[[bytes, random.Random], bytes]) -> None:
    """Read many damaged files in the place of a whole one.

    Args:
        read: reads the file; returns nothing if a damaged file was passed over, and raises a documented error.
    """
    whole, counts, before = path.read_bytes(), Counts(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read()
    for seed in range(CASES):
        content = change(whole, random.Random(seed))
        path.write_bytes(content)
        began = time.process_time()
        try:
            outcome = "accepted" if read() else "passed over"
        except (RunError, SpecError, CheckpointError) as error:
            outcome = "refused"
            message = str(error)
            assert str(path.parent) in message, f"case {seed}: {message}"
            assert len(message.encode()) <= CHARS, f"case {seed}: {message}"
        except Exception as error:
            raise AssertionError(f"{name}, case {seed}: {content[:300]!r}") from error
        counts.add(outcome, time.process_time() - began)
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(
        f"\n{name}: {CASES} tried, {dict(counts.outcomes)}, slowest {counts.slowest_s:.2f} s, {peak / 1e6:.0f} MB more"
    )
    assert counts.slowest_s < SECONDS or not is_long()
    assert peak < BYTES


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

    def read() -> bool:
        found = store.latest()
        assert found is not None
        assert found.progress in (PROGRESS, replace(PROGRESS, version=6)), "other counters than were saved"
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in TENSORS.items()), "other values"
        return found.progress.version == 7

    fuzz("checkpoints, bytes", path, read, cut_or_flipped)


def test_checkpoints_whose_progress_was_edited_are_passed_over(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), keep=2)
    store.save(Checkpoint(replace(PROGRESS, version=6), TENSORS))
    path = Path(store.save(Checkpoint(PROGRESS, TENSORS)))

    def change(content: bytes, chance: random.Random) -> bytes:
        def without_digest(metadata: dict[str, str]) -> dict[str, Any]:
            progress = damaged(metadata["progress"].encode(), chance).decode("utf-8", "surrogateescape")
            return {"format": metadata["format"], "progress": progress}

        return with_metadata(content, without_digest)

    def read() -> bool:
        found = store.latest()
        assert found is not None
        assert type(found.progress.version) is int
        assert found.progress.with_workers({"pets/0": "pets"}).rounds >= 0
        return found.progress.version != 6

    fuzz("checkpoints, progress", path, read, change)


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

    def read() -> bool:
        status = read_status(tmp_path)
        json.dumps(status, ensure_ascii=False).encode()
        assert all(task["made"] >= 0 for task in status["tasks"].values())
        return True

    fuzz("status.json", tmp_path / "status.json", read, damaged)


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
    def read() -> bool:
        result = Run(run_directory).result
        return all(task["top1"] is not None for task in result["best"]["tasks"].values())

    fuzz("result.json", run_directory / "result.json", read, damaged)


def test_damaged_facts_of_a_version_are_refused_by_name(run_directory: Path) -> None:
    path = run_directory / "best.safetensors"

    def change(content: bytes, chance: random.Random) -> bytes:
        if chance.random() < 0.5:
            return cut_or_flipped(content, chance)
        return with_metadata(
            content, lambda found: {"about": damaged(found["about"].encode(), chance).decode("latin-1")}
        )

    fuzz("best.safetensors", path, lambda: read_about(path)["tasks"] is not None, change)


def test_damaged_specs_of_a_run_are_refused_by_name(run_directory: Path) -> None:
    fuzz("spec.yaml", run_directory / "spec.yaml", lambda: bool(Run(run_directory).spec.tasks), cut_or_flipped)
