"""Start a training job, watch it, and leave a run directory behind."""

import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from multitask.engines import ENGINES
from multitask.job import Job
from multitask.runs import Run, write_json, write_spec, write_version
from multitask.server.messages import Evaluation, StepRecord
from multitask.spec import JobSpec, SpecError, dump_spec, dump_yaml, load_spec
from multitask.tracking import Tracker

log = logging.getLogger(__name__)


def train(
    spec: str | Path | Mapping[str, Any] | JobSpec, *, overwrite: bool = False, console: Console | None = None
) -> Run:
    """Run one training job from its spec to its end.

    Args:
        spec: a YAML file, a mapping, or a JobSpec.
        overwrite: replace a run that is in the run directory already.
        console: where the progress bars go; standard error by default.
    Returns:
        The run directory's content: `result`, `models()`, `export()`.
    Raises:
        SpecError and the errors of patches and data: before anything starts.
        TrainingError: a worker failed, or found no place on the cluster.
    """
    spec = load_spec(spec)
    directory = spec.run_directory.resolve()
    _check_directory(directory, overwrite)
    job = Job(spec)
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    write_spec(directory / "spec.yaml", spec)
    tracker = Tracker(
        spec.tracking.uri or f"sqlite:///{directory.parent}/mlflow.db",
        spec.tracking.experiment,
        spec.name,
        params={key: value for key, value in dump_spec(spec).items() if key != "tasks"},
        tasks={task["name"]: task for task in dump_spec(spec)["tasks"]},
        spec_text=dump_yaml(spec),
    )
    start = time.perf_counter()
    with tracker, _progress(console) as progress:
        watch = _Watch(job, tracker, progress)
        outcome = ENGINES[spec.engine.name](job, watch)
        for version, snapshot in outcome.versions.items():
            write_version(directory / f"{version}.safetensors", *job.state(snapshot.groups))
        result: dict[str, Any] = {
            version: {"version": snapshot.version, "round": snapshot.round, "tasks": snapshot.metrics}
            for version, snapshot in outcome.versions.items()
        }
        result |= {
            "engine": spec.engine.name,
            "parameters": job.parameters(),
            "seconds": time.perf_counter() - start,
            "mlflow_run_id": tracker.run_id,
            "tasks": watch.summary(outcome.processes),
        }
        write_json(directory / "result.json", result)
        tracker.log_artifact(directory / "result.json")
    return Run(directory)


@dataclass
class _TaskWatch:
    bar: TaskID
    pushes: int = 0
    staleness: list[int] = field(default_factory=list)
    skipped: int = 0
    bad_images: set[str] = field(default_factory=set)
    curve: list[dict[str, float]] = field(default_factory=list)


class _Watch:
    """Hands what happens to the progress bars, to MLflow and to the run's result."""

    def __init__(self, job: Job, tracker: Tracker, progress: Progress) -> None:
        self._job = job
        self._tracker = tracker
        self._progress = progress
        steps = job.spec.steps
        self._tasks = {
            task.name: _TaskWatch(progress.add_task(task.name, total=steps * task.workers, state="starting"))
            for task in job.spec.tasks
        }

    def __call__(self, records: list[StepRecord], evaluations: list[Evaluation]) -> None:
        by_task = defaultdict(list)
        for record in records:
            by_task[record.task].append(record)
        for task, news in by_task.items():
            watch = self._tasks[task]
            watch.pushes += len(news)
            watch.staleness += [record.staleness for record in news]
            watch.skipped += sum(record.skipped for record in news)
            for bad in {bad for record in news for bad in record.bad_images} - watch.bad_images:
                watch.bad_images.add(bad)
                log.warning("Task '%s' skips %s", task, bad)
            self._progress.update(watch.bar, completed=watch.pushes, state=f"loss {news[-1].loss:.3f}")
            self._tracker.log_steps(task, [_step_metrics(record) for record in news])
        for evaluation in evaluations:
            for task, metrics in evaluation.metrics.items():
                self._tasks[task].curve.append({"step": evaluation.round, **metrics})
                named = {f"validation_{name}": value for name, value in metrics.items()}
                self._tracker.log_metrics(task, named, evaluation.round)
            self._tracker.log_metrics(None, {"validation_mean_top1": evaluation.mean_top1}, evaluation.round)

    def summary(self, processes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """Per task: what the pushes, the staleness and the validation curve came to."""
        return {
            name: {
                "processes": [process for worker, process in processes.items() if self._job.workers[worker] == name],
                "pushes": watch.pushes,
                "mean_staleness": mean(watch.staleness),
                "skipped_images": watch.skipped,
                "curve": sorted(watch.curve, key=lambda point: point["step"]),
            }
            for name, watch in self._tasks.items()
        }


def _step_metrics(record: StepRecord) -> dict[str, float]:
    return {
        "step": record.step,
        "loss": record.loss,
        "rate": record.rate,
        "staleness": record.staleness,
        "samples_per_s": record.images / record.seconds,
        "skipped_images": record.skipped,
    }


def _progress(console: Console | None) -> Progress:
    columns = (
        TextColumn("{task.description:>16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console or Console(stderr=True))


def _check_directory(directory: Path, overwrite: bool) -> None:
    """A finished run is replaced on request only, and what is no run never."""
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not (directory / "spec.yaml").is_file():
        raise SpecError(f"Run directory '{directory}' holds other files and no run. Name another with `directory`.")
    if (directory / "result.json").is_file() and not overwrite:
        raise SpecError(f"Run directory '{directory}' holds a run. Name another with `directory`, or use --overwrite.")
