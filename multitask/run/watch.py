"""What happens in a run, for people: progress bars, MLflow, the status file and the run's result."""

import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from multitask.job.job import Job
from multitask.run.live import LiveStatus
from multitask.run.tracking import Tracker
from multitask.server import progress as server_progress
from multitask.server.messages import Evaluation, StepRecord

SPEED_EVERY_S = 10.0

log = logging.getLogger(__name__)


@dataclass
class _TaskWatch:
    """What the status file says of a task."""

    steps: int
    """Steps that all its workers together have to make."""
    made: int = 0
    pushes: int = 0
    """Applied to the shared tensors."""
    staleness: int = 0
    """Sum over the pushes."""
    redone: int = 0
    lost: int = 0
    rejected: int = 0
    skipped: int = 0
    bad_images: list[str] = field(default_factory=list)
    processes: dict[str, int] = field(default_factory=dict)
    """Worker -> the process that made its last step."""
    curve: list[dict[str, float]] = field(default_factory=list)
    latest: dict[str, float] = field(default_factory=dict)
    """Loss, rate, staleness and images per second of the last push."""


class Watch:
    """Hands what happens to the progress bars, to MLflow, to the status file and to the run's result."""

    def __init__(
        self, directory: Path, tracker: Tracker, console: Console | None, status: Mapping[str, Any] | None
    ) -> None:
        """Args:
        status: what the status file of a run said that goes on now.
        """
        self._tracker = tracker
        self._console = console or Console(stderr=True)
        self._live = LiveStatus(directory)
        self.rejected_calls = 0
        """Pushes and joins of unknown workers and earlier processes."""
        self._tasks = {} if status is None else {name: _TaskWatch(**task) for name, task in status["tasks"].items()}
        self._speed_from, self._pushed, self._pushed_bytes = time.monotonic(), 0, 0
        self._versions = {int(point["version"]) for task in self._tasks.values() for point in task.curve}

    @contextlib.contextmanager
    def showing(self, job: Job) -> Iterator[None]:
        """Show progress bars while the block runs."""
        columns = (
            TextColumn("{task.description:>16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as self._bars, self._live.beating():
            self._bar_of: dict[str, TaskID] = {}
            self.change_tasks(job)
            yield

    def change_tasks(self, job: Job) -> None:
        """Watch the tasks of this job: those that left go, new ones come."""
        self._job = job
        steps = {task.name: job.spec.steps * task.workers for task in job.spec.tasks}
        self._tasks = {name: self._tasks.get(name) or _TaskWatch(steps[name]) for name in steps}
        for name in self._bar_of.keys() - steps.keys():
            self._bars.remove_task(self._bar_of.pop(name))
        for name in steps.keys() - self._bar_of.keys():
            watch = self._tasks[name]
            self._bar_of[name] = self._bars.add_task(name, total=watch.steps, completed=watch.made, state="starting")
        self._write("running", now=True)

    def __call__(
        self, records: list[StepRecord], evaluations: list[Evaluation], progress: server_progress.Progress
    ) -> None:
        by_task = defaultdict(list)
        for record in records:
            by_task[record.task].append(record)
        for name, news in by_task.items():
            self._note_steps(name, news)
        for name, watch in self._tasks.items():
            workers = [state for worker, state in progress.workers.items() if self._job.workers[worker] == name]
            watch.made = sum(worker.step for worker in workers)
            watch.redone, watch.lost, watch.rejected = (
                sum(getattr(worker, count) for worker in workers) for count in ("redone", "lost", "rejected")
            )
            self._bars.update(self._bar_of[name], completed=watch.made, state=_line(watch))
        self.rejected_calls = progress.rejected_calls
        for evaluation in evaluations:
            self._note_evaluation(evaluation)
        self._log_speed(int(progress.rounds))
        # Before a checkpoint that lies after them: a run that goes on from it does not make them again.
        self._write("running", now=bool(evaluations))

    def say(self, text: str) -> None:
        self._console.print(text)

    def end(self, state: str, error: str | None = None) -> None:
        """Write the last status: finished, stopped or failed."""
        self._write(state, now=True, error=error)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Per task: what the pushes, the staleness and the validation curve came to."""
        return {
            name: {
                "processes": list(watch.processes.values()),
                "pushes": watch.pushes,
                "mean_staleness": watch.staleness / max(1, watch.pushes),
                "redone_steps": watch.redone,
                "lost_pushes": watch.lost,
                "rejected_pushes": watch.rejected,
                "skipped_images": watch.skipped,
                "curve": sorted(watch.curve, key=lambda point: point["step"]),
            }
            for name, watch in self._tasks.items()
        }

    def _note_steps(self, name: str, news: list[StepRecord]) -> None:
        watch = self._tasks[name]
        applied = [record for record in news if record.rejected is None and not record.redone]
        watch.pushes += len(applied)
        watch.staleness += sum(record.staleness for record in applied)
        watch.skipped += sum(record.skipped for record in news)
        for bad in dict.fromkeys(bad for record in news for bad in record.bad_images):
            if bad not in watch.bad_images:
                watch.bad_images.append(bad)
                log.warning("Task '%s' skips %s", name, bad, extra={"task": name})
        watch.processes |= {record.worker: record.pid for record in news}
        for record in news:
            if record.rejected is not None:
                about = {"task": record.task, "worker": record.worker, "step": record.step}
                log.warning("%s", record.rejected, extra=about)
        metrics = [_step_metrics(record) for record in news]
        watch.latest = {key: metrics[-1][key] for key in ("loss", "rate", "staleness", "samples_per_s")}
        self._tracker.log_steps(name, metrics)
        self._pushed_bytes += len(news) * self._job.pushed_bytes(name)
        self._pushed += len(applied)

    def _log_speed(self, round_: int) -> None:
        """Pushes and bytes per second of all tasks together, every few seconds."""
        span = time.monotonic() - self._speed_from
        if span >= SPEED_EVERY_S:
            speed = {"pushes_per_s": self._pushed / span, "pushed_bytes_per_s": self._pushed_bytes / span}
            self._tracker.log_metrics(None, speed, round_)
            self._speed_from, self._pushed, self._pushed_bytes = time.monotonic(), 0, 0

    def _note_evaluation(self, evaluation: Evaluation) -> None:
        """An evaluation that is made again, after going back to a checkpoint, is logged once."""
        if evaluation.version in self._versions:
            return
        self._versions.add(evaluation.version)
        for name, metrics in evaluation.metrics.items():
            self._tasks[name].curve.append({"step": evaluation.round, "version": evaluation.version, **metrics})
            named = {f"validation_{key}": value for key, value in metrics.items()}
            about = {"task": name, "step": evaluation.round}
            log.info("Validation of version %d: %s.", evaluation.version, metrics, extra=about)
            self._tracker.log_metrics(name, named, evaluation.round)
        self._tracker.log_metrics(None, {"validation_mean_top1": evaluation.mean_top1}, evaluation.round)

    def _write(self, state: str, *, now: bool = False, error: str | None = None) -> None:
        content = {
            "name": self._job.spec.name,
            "state": state,
            "error": error,
            "engine": self._job.spec.engine.name,
            "mlflow_run_id": self._tracker.run_id,
            "rejected_calls": self.rejected_calls,
            "tasks": {name: asdict(watch) for name, watch in self._tasks.items()},
        }
        self._live.write(content, now=now)


def _line(watch: _TaskWatch) -> str:
    """How a task stands, beside its bar."""
    if not watch.latest:
        return "starting"
    latest = watch.latest
    line = f"loss {latest['loss']:.3f}, {latest['samples_per_s']:.0f} images/s, staleness {latest['staleness']:.0f}"
    counts = {"redone": watch.redone, "lost": watch.lost, "rejected": watch.rejected, "skipped": watch.skipped}
    return ", ".join([line, *(f"{count} {name}" for name, count in counts.items() if count)])


def _step_metrics(record: StepRecord) -> dict[str, float]:
    return {
        "step": record.step,
        "loss": record.loss,
        "rate": record.rate,
        "staleness": record.staleness,
        "samples_per_s": record.images / record.seconds,
        "skipped_images": record.skipped,
        "step_seconds": record.seconds,
        "queue": record.queue,
    }
