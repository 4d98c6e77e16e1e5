"""The monitor of a run, which shows its progress in bars and records it in MLflow, status file and result."""

import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from multitask.job.job import Job
from multitask.run.files import TaskStatus
from multitask.run.live import LiveStatus
from multitask.run.tracking import Tracker
from multitask.server import progress as server_progress
from multitask.server.messages import Evaluation, StepRecord

SPEED_EVERY_S = 10.0

log = logging.getLogger(__name__)


class RunMonitor:
    """Show a run's progress in bars, and record it in MLflow, in the status file and in the run's result."""

    def __init__(
        self,
        directory: Path,
        job: Job,
        tracker: Tracker,
        console: Console | None,
        status: Mapping[str, Any] | None,
    ) -> None:
        """Args:
        directory: the run directory.
        job: the job at its start; `change_tasks` replaces it.
        console: console of the progress bars; standard error by default.
        status: content of the status file, if the run goes on from an earlier start.
        """
        self._tracker = tracker
        self._console = console or Console(stderr=True)
        self._live = LiveStatus(directory)
        self.rejected_calls = 0
        """Number of pushes and joins that came from unknown workers or from replaced processes."""
        tasks = {} if status is None else {name: TaskStatus(**task) for name, task in status["tasks"].items()}
        self._take_job(job, tasks)
        self._speed_from, self._pushed, self._pushed_bytes = time.monotonic(), 0, 0
        self._versions = {int(point["version"]) for task in self._tasks.values() for point in task.curve}

    def begin(self) -> None:
        """Write the first status, by which this process claims the run directory."""
        self._write("running", now=True)

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
        """Show the tasks of this job: tasks that it does not have are removed, and new ones are added."""
        self._take_job(job, self._tasks)
        for name in self._bar_of.keys() - self._tasks.keys():
            self._bars.remove_task(self._bar_of.pop(name))
        for name in self._tasks.keys() - self._bar_of.keys():
            status = self._tasks[name]
            self._bar_of[name] = self._bars.add_task(name, total=status.steps, completed=status.made, state="starting")
        self._write("running", now=True)

    def update(
        self, records: list[StepRecord], evaluations: list[Evaluation], progress: server_progress.Progress
    ) -> None:
        """Take in what has happened since the last call.

        Args:
            records: the records of the new steps.
            evaluations: the new evaluations.
            progress: the run's counters.
        """
        by_task = defaultdict(list)
        for record in records:
            by_task[record.task].append(record)
        for name, news in by_task.items():
            self._note_steps(name, news)
        for name, status in self._tasks.items():
            workers = [state for worker, state in progress.workers.items() if self._job.workers[worker] == name]
            status.made = sum(worker.step for worker in workers)
            status.redone, status.lost, status.rejected = (
                sum(getattr(worker, count) for worker in workers) for count in ("redone", "lost", "rejected")
            )
            self._bars.update(self._bar_of[name], completed=status.made, state=_line(status))
        self.rejected_calls = progress.rejected_calls
        for evaluation in evaluations:
            self._note_evaluation(evaluation)
        self._log_speed(int(progress.rounds))
        # An evaluation is written at once, before a later checkpoint: a run that goes on from that checkpoint does not
        # make the evaluation again.
        self._write("running", now=bool(evaluations))

    def say(self, text: str) -> None:
        """Print a line above the progress bars."""
        self._console.print(text, markup=False)

    def end(self, state: str, error: str | None = None) -> None:
        """Write the last status: "finished", "stopped" or "failed"."""
        self._write(state, now=True, error=error)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return for each task its counts, its mean staleness and its validation curve, for the run's result."""
        return {
            name: {
                "processes": list(status.processes.values()),
                "pushes": status.pushes,
                "mean_staleness": status.staleness / max(1, status.pushes),
                "redone_steps": status.redone,
                "lost_pushes": status.lost,
                "rejected_pushes": status.rejected,
                "skipped_images": status.skipped,
                "curve": sorted(status.curve, key=lambda point: point["step"]),
            }
            for name, status in self._tasks.items()
        }

    def _take_job(self, job: Job, tasks: Mapping[str, TaskStatus]) -> None:
        """Take over a job, and what is known of its tasks."""
        self._job = job
        steps = {task.name: job.spec.steps * task.workers for task in job.spec.tasks}
        self._tasks = {name: tasks.get(name) or TaskStatus(steps[name]) for name in steps}

    def _note_steps(self, name: str, news: list[StepRecord]) -> None:
        status = self._tasks[name]
        applied = [record for record in news if record.rejected is None and not record.redone]
        status.pushes += len(applied)
        status.staleness += sum(record.staleness for record in applied)
        status.skipped += sum(record.skipped for record in news)
        for bad in dict.fromkeys(bad for record in news for bad in record.bad_images):
            if bad not in status.bad_images:
                status.bad_images.append(bad)
                log.warning("Task '%s' skips %s", name, bad, extra={"task": name})
        status.processes |= {record.worker: record.pid for record in news}
        for record in news:
            if record.rejected is not None:
                about = {"task": record.task, "worker": record.worker, "step": record.step}
                log.warning("%s", record.rejected, extra=about)
        metrics = [_step_metrics(record) for record in news]
        status.latest = {key: metrics[-1][key] for key in ("loss", "rate", "staleness", "samples_per_s")}
        self._tracker.log_steps(name, metrics)
        self._pushed_bytes += len(news) * self._job.pushed_bytes(name)
        self._pushed += len(applied)

    def _log_speed(self, round_: int) -> None:
        """Log the pushes and bytes per second of all tasks together, once every few seconds."""
        span = time.monotonic() - self._speed_from
        if span >= SPEED_EVERY_S:
            speed = {"pushes_per_s": self._pushed / span, "pushed_bytes_per_s": self._pushed_bytes / span}
            self._tracker.log_metrics(None, speed, round_)
            self._speed_from, self._pushed, self._pushed_bytes = time.monotonic(), 0, 0

    def _note_evaluation(self, evaluation: Evaluation) -> None:
        """Log an evaluation, unless it repeats one from before the server went back to a checkpoint."""
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
            "mlflow_task_runs": self._tracker.task_runs,
            "rejected_calls": self.rejected_calls,
            "tasks": {name: asdict(status) for name, status in self._tasks.items()},
        }
        self._live.write(content, now=now)


def _line(status: TaskStatus) -> str:
    """Return the text beside a task's progress bar."""
    if not status.latest:
        return "starting"
    latest = status.latest
    line = f"loss {latest['loss']:.3f}, {latest['samples_per_s']:.0f} images/s, staleness {latest['staleness']:.0f}"
    counts = {"redone": status.redone, "lost": status.lost, "rejected": status.rejected, "skipped": status.skipped}
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
