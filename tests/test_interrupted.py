"""Work that is killed at any moment, or meets a full disk: a file is whole or not there, and the same work goes on."""

import csv
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

import patches
from multitask.cascade import load_cascade
from multitask.cascade.artifact import save_package
from multitask.data import open_table
from multitask.data.importing import import_table
from multitask.errors import TrainingError
from multitask.job.checkpoint import Checkpoint, CheckpointStore
from multitask.report.pages import write_sweep_report
from multitask.run.directory import Run, write_json
from multitask.server.progress import Progress
from multitask.spec.reading import load_spec
from multitask.sweep.final import Verdict
from multitask.sweep.outcomes import choices, choose, write_tables, write_winner
from multitask.sweep.searcher import read_settings
from multitask.sweep.summary import section
from patches.files import DiskFullError
from tests.disk import full_disk
from tests.multitask.data.tables import number_image
from tests.multitask.sweep.conftest import MakeOutcome, make_outcome

__all__ = ["make_outcome"]

V0_1 = Path(__file__).parent / "data" / "v0_1"
MOMENTS = 20


@dataclass(frozen=True)
class Work:
    """Something that writes files to a folder."""

    do: Callable[[Path], object]
    check: Callable[[Path], bool]
    """Reads what is in the folder, and raises if anything there is not whole; returns whether everything is there."""
    most_bytes: int
    """Size that one of its files exceeds."""


@pytest.fixture(params=["import", "checkpoint", "export", "cascade", "sweep", "report"])
def work(request: pytest.FixtureRequest) -> Work:
    made: Work = request.getfixturevalue(f"{request.param}_work")
    return made


def killed(do: Callable[[], object], after_s: float) -> bool:
    """Do something in a child of this process that is killed after some seconds; return whether that was in time."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the process ends at once, without any of Python's cleaning up
        signal.setitimer(signal.ITIMER_REAL, after_s)
        status = 1
        try:
            do()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def seconds_of(do: Callable[[], object]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


@pytest.mark.slow
def test_whatever_is_killed_leaves_whole_files_and_goes_on(work: Work, tmp_path: Path) -> None:
    seconds = min(seconds_of(partial(work.do, tmp_path / f"whole{number}")) for number in range(3))
    assert work.check(tmp_path / "whole0")

    chance, kills = random.Random(0), 0
    for moment in range(MOMENTS):
        folder = tmp_path / str(moment)
        folder.mkdir()
        kills += killed(partial(work.do, folder), seconds * (moment + chance.random()) / MOMENTS)
        if not work.check(folder):
            work.do(folder)
            assert work.check(folder)
    assert kills >= MOMENTS // 4


def test_a_full_disk_is_named_and_the_work_goes_on_when_there_is_room(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multitask.job.writing.WAITS_S", ())
    folder = tmp_path / "folder"
    folder.mkdir()
    with (
        full_disk(work.most_bytes),
        pytest.raises((DiskFullError, TrainingError), match=r"' needs at least [\d,]+ bytes") as full,
    ):
        work.do(folder)
    assert str(folder) in str(full.value)
    assert not work.check(folder)

    work.do(folder)

    assert work.check(folder)
    assert [path for path in folder.rglob(".*") if path.is_file()] == []


def test_an_import_that_was_killed_before_it_had_a_plan_begins_anew(import_work: Work, tmp_path: Path) -> None:
    (tmp_path / "table" / ".import").mkdir(parents=True)
    import_work.do(tmp_path)
    assert import_work.check(tmp_path)


# The works.


class Numbers:
    """A source whose row i is the picture of i."""

    name = "numbers"
    classes = ("even", "odd")

    def __init__(self, rows: int) -> None:
        self.labels = np.arange(rows) % 2
        self.ids = pa.array([f"n/{row}" for row in range(rows)])

    def read(self, rows: Sequence[int]) -> Iterator[bytes]:
        return map(number_image, rows)


class Call:
    """A call that was made."""

    def __init__(self, result: Any) -> None:
        self.result = result


class InThisProcess:
    """What an import uses of Ray, in one process: a call is made at once."""

    exceptions = ray.exceptions

    @staticmethod
    def put(value: Any) -> Any:
        return value

    @staticmethod
    def remote(function: Callable[..., Any]) -> Any:
        def call(*arguments: Any) -> Call:
            return Call(function(*arguments))

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=call))

    @staticmethod
    def get(call: Call) -> Any:
        return call.result

    @staticmethod
    def wait(calls: list[Any]) -> tuple[list[Any], list[Any]]:
        return calls[:1], calls[1:]

    @staticmethod
    def cluster_resources() -> dict[str, float]:
        return {"CPU": 1.0}


@pytest.fixture
def import_work(monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setattr("multitask.data.importing.ray", InThisProcess)

    def check(folder: Path) -> bool:
        if not (folder / "table" / "index.json").is_file():
            return False
        assert open_table(str(folder / "table")).num_rows == 300
        return not (folder / "table" / ".import" / "plan.json").exists()

    return Work(
        lambda folder: import_table(Numbers(300), str(folder / "table"), rows_per_shard=100), check, most_bytes=2000
    )


@pytest.fixture
def checkpoint_work() -> Work:
    tensors = {"values/backbone/weight": torch.ones(300_000)}

    def do(folder: Path) -> None:
        store = CheckpointStore(str(folder), keep=2)
        for _ in range(3):
            before = store.latest()
            store.save(Checkpoint(Progress(version=0 if before is None else before.progress.version + 1), tensors))

    def check(folder: Path) -> bool:
        found = CheckpointStore(str(folder), keep=2).latest()
        return found is not None and found.progress.version >= 2

    return Work(do, check, most_bytes=500_000)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run of version 0.1, in the current folder, because the paths in it are relative."""
    shutil.copytree(V0_1, tmp_path / "v0_1", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.chdir(tmp_path / "v0_1")
    return tmp_path / "v0_1"


@pytest.fixture
def export_work(files: Path) -> Work:
    run = Run(files / "finished")
    names = {"backbone.safetensors", *(f"{task.name}.patch" for task in run.spec.tasks)}

    def check(folder: Path) -> bool:
        found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        for name in found - {"backbone.safetensors"}:
            patches.inspect_bundle(folder / name)
        if found == names:
            patches.open_export(folder)
        return found == names

    return Work(lambda folder: run.export("best", folder), check, most_bytes=4000)


@pytest.fixture
def cascade_work(files: Path) -> Work:
    cascade = load_cascade(files / "pets.cascade")

    def check(folder: Path) -> bool:
        path = folder / "again.cascade"
        return path.exists() and load_cascade(path) == cascade

    return Work(
        lambda folder: save_package(cascade, folder / "again.cascade", files / "finished" / "export"), check, 5000
    )


@pytest.fixture
def sweep_work(make_outcome: MakeOutcome) -> Work:
    outcomes = [make_outcome(number, 50.0 + number) for number in range(8)]
    choice = choose(outcomes)
    assert choice is not None

    def do(folder: Path) -> None:
        write_json(folder / "settings.json", [dict(outcome.plan.values) for outcome in outcomes])
        write_tables(outcomes, folder)
        write_winner(choice, "rates", folder)

    def check(folder: Path) -> bool:
        wholes = {
            "settings.json": lambda path: len(read_settings(path)),
            "trials.csv": lambda path: len(list(csv.DictReader(path.read_text().splitlines()))),
            "trials.parquet": lambda path: pq.read_table(path).num_rows,
            "best.yaml": lambda path: 8 * (load_spec(path).name == "rates_best"),
        }
        found = {name for name in wholes if (folder / name).exists()}
        assert {wholes[name](folder / name) for name in found} <= {8}
        return found == wholes.keys()

    return Work(do, check, most_bytes=100)


@pytest.fixture
def report_work(make_outcome: MakeOutcome) -> Work:
    outcomes = [make_outcome(number, 50.0 + number) for number in range(40)]
    metrics = {"top1": 50.0, "top5": 90.0, "loss": 1.0}
    verdict = Verdict(trial=39, directory="trials/39", version="best", tasks={"pets": metrics})
    shown = section(outcomes, {}, [], choices(outcomes)[-1], verdict)

    def check(folder: Path) -> bool:
        path = folder / "report.html"
        assert not path.exists() or path.read_text().rstrip().endswith("</html>")
        return path.exists()

    return Work(lambda folder: write_sweep_report("rates", shown, folder), check, most_bytes=1000)
