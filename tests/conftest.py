"""What the tests share: generated tables, a small job spec, one local Ray."""

import io
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

from multitask.data import write_table
from multitask.engines import ENGINES, Driver, Outcome
from multitask.job.checkpoint import CheckpointStore
from multitask.job.job import Job
from multitask.server.messages import Evaluation, StepRecord
from multitask.server.progress import Progress
from multitask.spec.reading import load_spec
from multitask.spec.schema import JobSpec

# How long an example takes says more of the machine than of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

MakeData = Callable[..., str]
MEMORY, ROOM_BYTES = Path("/dev/shm"), 8 * 2**30
"""Linux's file system in memory, and what has to be free there for the files of all tests."""
LONGEST = ("integration/test_demo.py", "integration/test_chaos.py", "integration/test_sweep.py", "simulation/")
"""Starts of paths, longest first."""

if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= ROOM_BYTES:
    # MLflow waits for the disk after each of its records: in memory, tests that train take half the time.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def png(seed: int, label: int, size: int = 12) -> bytes:
    """A noisy picture whose brightness tells its label."""
    noise = np.random.default_rng(seed).integers(0, 80, (size, size, 3))
    buffer = io.BytesIO()
    Image.fromarray((noise + 40 * label).astype(np.uint8)).save(buffer, "png")
    return buffer.getvalue()


CLASSES = [f"class {label}" for label in range(4)]
"""Class list of the tables that `make_data` writes by default."""


def write_named(path: Path, classes: Sequence[str], seed: int = 0, rows: int = 24) -> None:
    """Write a table with this class list. Its images are the same in whatever order the classes are."""
    shown = [name for name in CLASSES if name in classes]
    names = [shown[row % len(shown)] for row in range(rows)]
    images = ((png(seed + row, CLASSES.index(name)), classes.index(name)) for row, name in enumerate(names))
    write_table(path, images, classes)


@dataclass
class EngineRun:
    """What an engine did with a job."""

    job: Job
    outcome: Outcome
    records: list[StepRecord]
    evaluations: list[Evaluation]
    progress: Progress


def wait_until(condition: Callable[[], bool], timeout_s: float = 300) -> None:
    """Look again and again; fails when the time is over."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def store_of(job: Job) -> CheckpointStore:
    return CheckpointStore(job.spec.checkpoint_folder, job.spec.checkpoints.keep)


def run_engine(
    job: Job,
    wants_pause: Callable[[], bool] = lambda: False,
    watch: Callable[[list[StepRecord]], None] = lambda _: None,
) -> EngineRun:
    """Run a job's engine without a trainer around it."""
    records: list[StepRecord] = []
    evaluations: list[Evaluation] = []
    progress = job.progress

    def note(new_records: list[StepRecord], new_evaluations: list[Evaluation], new_progress: Progress) -> None:
        nonlocal progress
        records.extend(new_records)
        evaluations.extend(new_evaluations)
        progress = new_progress
        watch(new_records)

    outcome = ENGINES[job.spec.engine.name](job, Driver(note, store_of(job), wants_pause))
    return EngineRun(job, outcome, records, evaluations, progress)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest.

    `make` runs the tests in two processes, each of which takes the next file when it is done with one. A long file at
    the end would keep one of them waiting.
    """

    def turn(item: pytest.Item) -> int:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        return next((number for number, start in enumerate(LONGEST) if path.startswith(start)), len(LONGEST))

    items.sort(key=turn)


@pytest.fixture(scope="session")
def make_data(tmp_path_factory: pytest.TempPathFactory) -> MakeData:
    """Write the tables train, validation and test of one data set and return their folder."""

    def make(classes: int = 4, rows: int = 24, seed: int = 0, size: int = 12) -> str:
        folder = tmp_path_factory.mktemp("data")
        for number, split in enumerate(("train", "validation", "test")):
            images = (
                (png(10_000 * seed + 1000 * number + row, row % classes, size), row % classes) for row in range(rows)
            )
            write_table(folder / split, images, [f"class {label}" for label in range(classes)])
        return str(folder)

    return make


@pytest.fixture(scope="session")
def data_folders(make_data: MakeData) -> dict[str, str]:
    return {name: make_data(seed=seed) for seed, name in enumerate(("pets", "cars", "food"))}


@pytest.fixture
def make_spec(data_folders: dict[str, str], tmp_path: Path) -> Callable[..., JobSpec]:
    """A job that trains in seconds: a MobileNetV2 of three blocks on 8 px images; keywords change the spec."""

    def make(tasks: dict[str, dict[str, Any]] | None = None, **changes: Any) -> JobSpec:
        tasks = tasks or {"pets": {}, "cars": {}}
        spec: dict[str, Any] = {
            "name": "job",
            "backbone": {
                "name": "mobilenet_v2",
                "num_classes": 4,
                "options": {
                    "stem_stride": 1,
                    "inverted_residual_setting": [[1, 8, 1, 1], [2, 8, 2, 1], [2, 8, 1, 1]],
                    "last_channel": 16,
                    "dropout": 0.0,
                },
            },
            "task_defaults": {"method": "scale_bias+last_layer", "num_classes": 4, "resolution": 8, "batch_size": 8},
            "tasks": [{"name": name, "data": data_folders[name.split("_")[0]], **own} for name, own in tasks.items()],
            "train_shared": True,
            "steps": 4,
            "evaluate_every": 2,
            "optimizer": {"name": "adamw", "rate": 0.01},
            "engine": {"name": "local"},
            "directory": str(tmp_path / "runs" / "job"),
        }
        return load_spec(spec, changes)

    return make


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for all tests that need it."""
    import ray

    from multitask.cluster.session import start_ray

    start_ray(num_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits are compared across processes: one thread everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
