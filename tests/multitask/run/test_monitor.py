"""What a training shows of its progress on a terminal and in a pipe, and what it counts."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from rich.console import Console

from multitask.job.job import Job
from multitask.run.display import Bars, Lines
from multitask.run.files import TaskStatus
from multitask.run.live import read_status
from multitask.run.monitor import RunMonitor
from multitask.server.messages import Evaluation, StepRecord
from multitask.server.progress import Progress, WorkerProgress
from multitask.spec.schema import JobSpec
from tests.multitask.test_progress import Clock, terminal

MakeSpec = Callable[..., JobSpec]
UNSEEN: dict[str, Any] = {"rate": 0.1, "skipped": 0, "bad_images": (), "pid": 1, "queue": 0, "version": 1, "round": 0}


class Watched:
    """A monitor of two tasks whose clock and steps the test moves; "cars" has two workers."""

    def __init__(self, make_spec: MakeSpec, file: io.StringIO, console: Console | None = None, **spec: Any) -> None:
        self.clock, self.file = Clock(), file
        self.job = Job(make_spec({"pets": {}, "cars": {"workers": 2}}, **{"steps": 400, "evaluate_every": 100} | spec))
        directory = self.job.spec.run_directory
        directory.mkdir(parents=True, exist_ok=True)
        status = read_status(directory) if (directory / "status.json").exists() else None
        tracker = MagicMock(run_id="f00d", task_runs={})
        self.monitor = RunMonitor(directory, self.job, tracker, console or Console(file=file), status, self.clock)
        self.progress = Progress(workers={name: WorkerProgress() for name in self.job.workers})

    @contextmanager
    def showing(self) -> Iterator[None]:
        with self.monitor.showing(self.job):
            yield

    def lines(self) -> list[str]:
        """The lines since the last call."""
        lines = self.file.getvalue().splitlines()
        self.file.seek(0)
        self.file.truncate()
        return lines

    def make(
        self,
        steps: dict[str, Sequence[float]],
        seconds: float = 0,
        validated: Sequence[Evaluation] = (),
        **counts: int,
    ) -> None:
        """Let time pass, and then tell the monitor of steps with these losses, by worker.

        Args:
            counts: values for counters of the last worker.
        """
        self.clock.now += seconds
        records = []
        for worker, losses in steps.items():
            for loss in losses:
                step = self.progress.workers[worker].step
                about = {"worker": worker, "task": self.job.workers[worker], "step": step, "loss": loss}
                records.append(StepRecord(**about, **UNSEEN, staleness=0, images=32, seconds=0.1))
                self.progress.workers[worker].step += 1
        for name, count in counts.items():
            setattr(self.progress.workers["cars/1"], name, count)
        self.monitor.update(records, list(validated), self.progress)


def evaluation(version: int, pets: float, cars: float, *, best: bool) -> Evaluation:
    metrics = {name: {"top1": top1, "top5": 100.0, "loss": 1.0} for name, top1 in {"pets": pets, "cars": cars}.items()}
    return Evaluation(version, version, metrics, best, {}, server=1)


@pytest.fixture
def watched(make_spec: MakeSpec) -> Watched:
    return Watched(make_spec, io.StringIO())


def test_a_pipe_gets_a_line_for_each_task_every_half_minute(
    watched: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    with watched.showing():
        watched.monitor.change_tasks(watched.job)  # as the trainer does once more, with the id of the MLflow run
        assert watched.lines() == ["pets: starts at step 0 of 400", "cars: starts at step 0 of 800"]
        watched.make({"pets/0": [0.7]}, seconds=10)  # the first step, from which on the speed is known
        watched.make({"pets/0": [0.5] * 59, "cars/0": [2.0] * 10, "cars/1": [2.0] * 10}, seconds=19)
        assert watched.lines() == []
        watched.make({"pets/0": [0.6] * 20}, seconds=1)

        # The mean loss of all 80 steps is 42.2 / 80.
        # These are 80 * 32 images in half a minute. 320 steps are left; 79 were made in the 20 s since the first one.
        assert watched.lines() == [
            "pets: step 80 of 400, loss 0.527, 85 images/s, 81 s left",
            # Since its first steps were told, a second ago, none was made.
            "cars: step 20 of 800, loss 2, 21 images/s",
        ]
        watched.make({"cars/0": [1.0]}, seconds=30, lost=3, rejected=1)
        assert watched.lines() == [
            "pets: step 80 of 400, no step in the last 30 s",
            "cars: step 21 of 800, loss 1, 1 images/s, 6 h 42 min left, 3 lost, 1 rejected",
        ]
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_pipe_gets_a_line_for_each_validation(watched: Watched) -> None:
    with watched.showing():
        watched.lines()
        watched.make({}, validated=[evaluation(120, 81.2, 77.0, best=True)])
        again = [evaluation(120, 81.2, 77.0, best=True), evaluation(240, 80.0, 77.04, best=False)]
        watched.make({}, validated=again)  # from a server that went back
    assert watched.lines() == [
        "validation of version 120: pets 81.2 %, cars 77.0 %, mean 79.1 %, best so far",
        "validation of version 240: pets 80.0 %, cars 77.0 %, mean 78.5 %",
    ]


def test_a_task_that_has_made_its_steps_is_shown_once_more(watched: Watched) -> None:
    with watched.showing():
        watched.make({"pets/0": [0.5] * 400}, seconds=29)
        watched.lines()
        watched.make({"cars/0": [1.0]}, seconds=1)
        assert [line.partition(",")[0] for line in watched.lines()] == [
            "pets: step 400 of 400",
            "cars: step 1 of 800",
        ]
        watched.make({"cars/0": [1.0]}, seconds=30)
        assert [line.partition(",")[0] for line in watched.lines()] == ["cars: step 2 of 800"]


def test_a_line_is_whole_however_long_a_name_is() -> None:
    file, name = io.StringIO(), "[b]:cat:" + "n" * 90
    Lines(Console(file=file), Clock()).change_tasks({name: TaskStatus(4)})
    assert file.getvalue() == f"{name}: starts at step 0 of 4\n"


def test_a_run_that_goes_on_with_more_steps_counts_up_to_them(watched: Watched, make_spec: MakeSpec) -> None:
    with watched.showing():
        watched.make({"pets/0": [0.5] * 400})
    watched.monitor.end("stopped")

    later = Watched(make_spec, io.StringIO(), steps=500)
    with later.showing():
        assert later.lines() == ["pets: starts at step 400 of 500", "cars: starts at step 0 of 1,000"]
        later.progress.workers["pets/0"].step = 400
        later.make({"pets/0": [0.5] * 7})
        later.monitor.end("stopped")
    status = read_status(later.job.spec.run_directory)["tasks"]["pets"]
    assert (status["made"], status["steps"]) == (407, 500)


def test_pushes_that_are_made_again_after_a_loss_are_no_more_than_the_steps(watched: Watched) -> None:
    with watched.showing():
        watched.make({"pets/0": [0.5] * 207, "cars/1": [1.0] * 10})
        watched.progress.workers["pets/0"].step = 200  # all workers went back to a checkpoint
        watched.make({"pets/0": [0.5] * 200, "cars/1": [1.0] * 2}, lost=4, rejected=3)
    pets, cars = watched.monitor.summary().values()
    assert (pets["pushes"], pets["mean_staleness"]) == (400, 0)
    assert cars["pushes"] == 12 - 4 - 3


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_whole_names_and_numbers_beside_the_bars(make_spec: MakeSpec, width: int) -> None:
    file = io.StringIO()
    watched = Watched(make_spec, file, terminal(file, width))
    with watched.showing():
        steps = {"pets/0": [0.531] * 120, "cars/0": [1.25] * 300, "cars/1": [1.25] * 300}
        watched.make(steps, validated=[evaluation(120, 81.2, 77.0, best=True)], redone=12, lost=34)
        watched.lines()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", "\n".join(watched.lines()))
    for words in ("pets", "cars", "120/400", "600/800", "loss 0.531, 320 images/s,", "81.2 %", "77.0 %", "34 lost"):
        assert words in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width


@pytest.mark.parametrize("width", [80, 120])
def test_a_long_name_beside_a_bar_is_folded_and_not_cut(width: int) -> None:
    file = io.StringIO()
    latest = {"loss": 0.531, "samples_per_s": 310.4, "staleness": 3.0}
    tasks = {"猫" * 50: TaskStatus(2_669_098, latest=latest, redone=12, lost=3456), "[b]": TaskStatus(1)}
    with Bars(terminal(file, width)) as bars:
        bars.change_tasks(tasks)
        bars.update(tasks, {}, [])
        file.truncate(0)
    shown = file.getvalue()
    assert (shown.count("猫") % 50, "[b]" in shown, "…" in shown) == (0, True, False)
    for words in ("0/2669098", "-:--:--", "0.531,", "310", "12 redone", "3,456"):
        assert words in shown


def test_the_status_file_has_the_numbers_of_the_lines(watched: Watched, tmp_path: Path) -> None:
    with watched.showing():
        watched.make({"pets/0": [0.5] * 3}, validated=[evaluation(3, 50.0, 25.0, best=True)])
    status = read_status(watched.job.spec.run_directory)["tasks"]
    assert watched.job.spec.run_directory.is_relative_to(tmp_path)
    assert (status["pets"]["made"], status["pets"]["latest"]["loss"]) == (3, 0.5)
    assert status["cars"]["curve"] == [{"step": 3, "version": 3, "top1": 25.0, "top5": 100.0, "loss": 1.0}]
