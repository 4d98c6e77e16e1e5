"""What happens to a run whose folder others change, or whose disk is full, while it goes on."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from rich.console import Console
from rich.errors import LiveError

from multitask.engines import ENGINES, Driver, Outcome
from multitask.errors import TrainingError
from multitask.job.job import Job
from multitask.run.directory import Run, write_spec
from multitask.run.live import REQUESTS, read_status
from multitask.run.monitor import RunMonitor
from multitask.run.tasks import TaskRecord, read_tasks, write_tasks
from multitask.run.trainer import Training
from multitask.server.messages import Evaluation
from multitask.spec.reading import dump_spec
from multitask.spec.schema import JobSpec
from tests.conftest import store_of
from tests.disk import full_disk

MakeSpec = Callable[..., JobSpec]
Disturb = Callable[[Job, Driver], None]
RunWith = Callable[..., Run]


def told(job: Job, version: int, top1: float) -> Evaluation:
    metrics = {task.name: {"top1": top1, "top5": 100.0, "loss": 1.0} for task in job.spec.tasks}
    groups = {name: group.state() for name, group in job.groups.items()}
    return Evaluation(version, version, metrics, True, groups, server=1)


@pytest.fixture
def job(make_spec: MakeSpec) -> Job:
    return Job(make_spec({"pets": {}}))


@pytest.fixture
def run_with(job: Job, monkeypatch: pytest.MonkeyPatch) -> RunWith:
    """Run the job, without MLflow, on an engine that reports one evaluation, then does as it is told, and ends."""
    monkeypatch.setattr("multitask.job.writing.WAITS_S", (0.001,))

    def run_with(disturb: Disturb, at_the_end: Disturb = lambda *_: None) -> Run:
        def engine(job: Job, driver: Driver) -> Outcome:
            driver.watch([], [told(job, 1, 90.0)], job.progress)
            disturb(job, driver)
            last = told(job, 2, 50.0)
            driver.watch([], [last], job.progress)
            at_the_end(job, driver)
            return Outcome(versions={"last": last})

        monkeypatch.setitem(ENGINES, "local", engine)
        directory = job.spec.run_directory
        write_spec(directory / "spec.yaml", job.spec)
        write_tasks(directory, job, {})
        tracker = MagicMock(run_id="f00d", task_runs={})
        tracker.__exit__.return_value = False
        monitor = RunMonitor(directory, job, tracker, Console(quiet=True), None)
        return Training(directory, job, store_of(job), tracker, monitor).run()

    return run_with


def test_a_run_whose_folder_is_removed_says_so_makes_it_anew_and_ends(
    job: Job, run_with: RunWith, caplog: pytest.LogCaptureFixture
) -> None:
    def remove(job: Job, driver: Driver) -> None:
        shutil.rmtree(job.spec.run_directory)
        assert not driver.wants_pause()
        assert (job.spec.run_directory / "spec.yaml").is_file()

    run = run_with(remove)

    assert {name: record.classes for name, record in read_tasks(run.directory).items()} == job.classes
    assert sum("were removed" in record.getMessage() for record in caplog.records) == 1
    assert run.spec == job.spec
    assert run.result["best"]["version"] == 2
    lines = (run.directory / "log.jsonl").read_text().splitlines()
    assert "were removed" in json.loads(lines[0])["event"]


def test_class_lists_that_somebody_removes_are_written_again(job: Job, run_with: RunWith) -> None:
    def remove(job: Job, driver: Driver) -> None:
        (job.spec.run_directory / "tasks.json").unlink()
        assert not driver.wants_pause()

    assert read_tasks(run_with(remove).directory)["pets"].classes == job.classes["pets"]


def test_class_lists_that_somebody_damages_end_no_run(run_with: RunWith) -> None:
    before: list[dict[str, TaskRecord]] = []

    def damage(job: Job, _: Driver) -> None:
        before.append(read_tasks(job.spec.run_directory))
        (job.spec.run_directory / "tasks.json").write_bytes(b"{")

    assert read_tasks(run_with(damage).directory) == before[0]


def test_what_fails_before_the_training_ends_the_claim(
    job: Job, run_with: RunWith, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook may show another progress bar already, which rich refuses."""

    def refuse(*_: object) -> None:
        raise LiveError("Only one live display may be active at once")

    monkeypatch.setattr("multitask.run.monitor.display_on", refuse)
    with pytest.raises(LiveError):
        run_with(lambda *_: None)

    status = read_status(job.spec.run_directory)
    assert status["state"] == "failed"
    assert "Only one live display" in status["error"]


@pytest.mark.parametrize("best", [b"", b"\x08" * 99, None], ids=["empty", "damaged", "gone"])
def test_a_best_version_that_is_damaged_or_gone_is_chosen_anew(run_with: RunWith, best: bytes | None) -> None:
    def damage(job: Job, _: Driver) -> None:
        path = job.spec.run_directory / "best.safetensors"
        path.unlink()
        if best is not None:
            path.write_bytes(best)

    assert run_with(damage).result["best"]["version"] == 2
    assert run_with(lambda *_: None).result["best"]["version"] == 1  # without damage
    assert run_with(lambda *_: None, at_the_end=damage).result["best"]["version"] == 2


def test_a_file_in_the_checkpoints_place_ends_the_run_with_what_to_do(job: Job, run_with: RunWith) -> None:
    def replace(job: Job, driver: Driver) -> None:
        Path(job.spec.checkpoint_folder).write_bytes(b"")
        driver.store.save(job.checkpoint(job.progress, {}))

    with pytest.raises(TrainingError) as error:
        run_with(replace)

    message = str(error.value)
    assert "The checkpoint in '" in message
    assert "put the folder back" in message
    assert f"Then `multitask resume {job.spec.run_directory}` goes on" in message
    status = json.loads((job.spec.run_directory / "status.json").read_text())
    assert status["state"] == "failed"


def test_a_full_disk_ends_the_run_with_what_is_needed_and_what_is_kept(job: Job, run_with: RunWith) -> None:
    directory = job.spec.run_directory

    def fill(job: Job, driver: Driver) -> None:
        driver.store.save(job.checkpoint(job.progress, {name: group.state() for name, group in job.groups.items()}))
        with full_disk(10_000):
            driver.watch([], [told(job, 2, 95.0)], job.progress)

    with pytest.raises(TrainingError) as error:
        run_with(fill)

    message = str(error.value)
    assert f"'{directory / 'best.safetensors'}' needs at least" in message
    assert f"The last checkpoint is {job.spec.checkpoint_folder}/checkpoint-000000.safetensors" in message
    assert f"multitask resume {directory}" in message
    assert json.loads((directory / "status.json").read_text())["state"] == "failed"
    assert list(directory.rglob(".*")) == []


def test_no_request_ends_the_run(job: Job, run_with: RunWith) -> None:
    folder = job.spec.run_directory / REQUESTS
    task = dump_spec(job.spec)["tasks"][0]
    tasks = {
        "head": {**task, "name": "more", "num_classes": 10**12},
        "image": {**task, "name": "more", "resolution": 10**9},
        "odd": {"name": ["more"], "data": 3.5},
        "twice": task,
    }

    def ask(_: Job, driver: Driver) -> None:
        folder.mkdir()
        os.mkfifo(folder / "pipe.json")
        (folder / "folder.json").mkdir()
        (folder / "deep.json").write_text("[" * 100_000)
        for name, content in tasks.items():
            (folder / f"{name}.json").write_text(json.dumps({"attach": content}))
        assert not driver.wants_pause()

    run = run_with(ask)

    assert run.result["last"]["version"] == 2
    errors = {path.stem: json.loads(path.read_text())["error"] for path in folder.glob("*.answer")}
    assert errors.keys() == {"pipe", "folder", "deep", *tasks}
    assert "num_classes" in errors["head"]
    assert "resolution" in errors["image"]
    assert max(map(len, errors.values())) <= 1000
