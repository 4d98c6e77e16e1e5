"""How a training shows its progress: bars on a terminal, and lines where nobody looks at one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from multitask.progress import Clock, Pace, Speed
from multitask.run.files import TaskStatus
from multitask.server.messages import Evaluation, StepRecord


class Display(Protocol):
    """Shows the progress of a training while it is entered as a context."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...

    def change_tasks(self, tasks: Mapping[str, TaskStatus]) -> None:
        """Show these tasks, and no others."""

    def update(
        self,
        tasks: Mapping[str, TaskStatus],
        records: Mapping[str, Sequence[StepRecord]],
        evaluations: Sequence[Evaluation],
    ) -> None:
        """Show where the tasks stand.

        Args:
            tasks: task -> its status, which contains the news already.
            records: task -> the records of its steps since the last call, for the tasks that made some.
            evaluations: the evaluations since the last call.
        """


def display_on(console: Console, clock: Clock) -> Display:
    """Return bars where the console is a terminal, and lines elsewhere."""
    return Bars(console) if console.is_interactive else Lines(console, clock)


class Bars:
    """A bar for each task, with its loss, its speed and its latest validation accuracy."""

    def __init__(self, console: Console) -> None:
        # Where a line is too long, the name and the state go on in the next one, and nothing is cut.
        columns = (
            TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
            BarColumn(min(40, max(10, console.width - 90)), table_column=Column(no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[state]}", markup=False, table_column=Column(overflow="fold")),
        )
        self._bars = Progress(*columns, console=console)
        self._bar_of: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bars.stop()

    def change_tasks(self, tasks: Mapping[str, TaskStatus]) -> None:
        for name in self._bar_of.keys() - tasks.keys():
            self._bars.remove_task(self._bar_of.pop(name))
        for name in [name for name in tasks if name not in self._bar_of]:
            status = tasks[name]
            self._bar_of[name] = self._bars.add_task(name, total=status.steps, completed=status.made, state="starting")

    def update(
        self,
        tasks: Mapping[str, TaskStatus],
        records: Mapping[str, Sequence[StepRecord]],  # noqa: ARG002
        evaluations: Sequence[Evaluation],  # noqa: ARG002
    ) -> None:
        for name, status in tasks.items():
            self._bars.update(self._bar_of[name], completed=status.made, state=_state(status))


@dataclass
class Window:
    """What happened in a task since its last line."""

    steps: int = 0
    images: int = 0
    loss: float = 0.0
    """Sum over the steps."""

    def add(self, records: Sequence[StepRecord]) -> None:
        self.steps += len(records)
        self.images += sum(record.images for record in records)
        self.loss += sum(record.loss for record in records)


class Lines:
    """Every half minute a line for each task, and a line for each validation."""

    def __init__(self, console: Console, clock: Clock) -> None:
        """Args:
        clock: the time, in seconds.
        """
        self._console, self._clock = console, clock
        self._windows: dict[str, Window] = {}
        self._speeds: dict[str, Speed] = {}
        """Task -> its speed, from its first step on: the time that processes take to start says nothing of the rest."""
        self._pace = Pace(clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def change_tasks(self, tasks: Mapping[str, TaskStatus]) -> None:
        for name in [name for name in tasks if name not in self._windows]:
            self._print(f"{name}: starts at step {tasks[name].made:,} of {tasks[name].steps:,}")
        self._windows = {name: self._windows.get(name, Window()) for name in tasks}
        self._speeds = {name: speed for name, speed in self._speeds.items() if name in tasks}

    def update(
        self,
        tasks: Mapping[str, TaskStatus],
        records: Mapping[str, Sequence[StepRecord]],
        evaluations: Sequence[Evaluation],
    ) -> None:
        now = self._clock()
        for name, news in records.items():
            self._windows[name].add(news)
            self._speeds.setdefault(name, Speed(tasks[name].made, now))
        for evaluation in evaluations:
            self._print(validation_line(evaluation))
        if seconds := self._pace.due():
            for name, status in tasks.items():
                if status.made < status.steps or self._windows[name].steps:
                    self._print(f"{name}: {self._progress(name, status, seconds, now)}")
            self._windows = {name: Window() for name in tasks}

    def _progress(self, name: str, status: TaskStatus, seconds: float, now: float) -> str:
        """Return where a task stands, with its mean loss and its speed in the seconds since its last line."""
        window = self._windows[name]
        step = f"step {status.made:,} of {status.steps:,}"
        if not window.steps:
            return f"{step}, no step in the last {seconds:.0f} s"
        speed = f"loss {window.loss / window.steps:.3g}, {window.images / seconds:,.0f} images/s"
        return f"{step}, {speed}{self._speeds[name].left(status.made, status.steps, now)}{_faults(status)}"

    def _print(self, line: str) -> None:
        self._console.out(line, highlight=False)


def validation_line(evaluation: Evaluation) -> str:
    """Return an evaluation in words: the top-1 accuracy of each task, and their mean if there are several."""
    shown = [f"{name} {metrics['top1']:.1f} %" for name, metrics in evaluation.metrics.items()]
    if len(shown) > 1:
        shown.append(f"mean {evaluation.mean_top1:.1f} %")
    if evaluation.best:
        shown.append("best so far")
    return f"validation of version {evaluation.version}: {', '.join(shown)}"


def _state(status: TaskStatus) -> str:
    """Return the text beside a task's bar."""
    if not status.latest:
        return "starting"
    latest = status.latest
    state = f"loss {latest['loss']:.3g}, {latest['samples_per_s']:,.0f} images/s"
    if status.curve:
        state += f", validation {status.curve[-1]['top1']:.1f} %"
    if latest["staleness"]:
        state += f", staleness {latest['staleness']:.0f}"
    return state + _faults(status)


def _faults(status: TaskStatus) -> str:
    """Return the counts of what went wrong, each with a comma before it; empty if nothing did."""
    counts = {"redone": status.redone, "lost": status.lost, "rejected": status.rejected, "skipped": status.skipped}
    return "".join(f", {count:,} {name}" for name, count in counts.items() if count)
