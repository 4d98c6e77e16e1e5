"""What a training tells MLflow and its sweep: a training alone, or one that is a trial of a sweep."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from multitask.job import LoadedInputs
from multitask.run.mlflow_store import sqlite_uri
from multitask.run.tracking import Tracker
from multitask.server.messages import Evaluation
from multitask.spec.reading import dump_spec, dump_yaml
from multitask.spec.schema import JobSpec


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The settings that a sweep gives to one of its trials."""

    parent_run_id: str | None = None
    """Id of the sweep's MLflow run."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """MLflow params of the trial, in addition to its spec."""
    loaded: LoadedInputs | None = None
    """Inputs that all trials share."""
    on_evaluation: Callable[[Evaluation], None] = lambda _: None
    """Called with each evaluation. Training waits until it returns."""
    wants_stop: Callable[[], bool] = lambda: False
    """Called from time to time. If it returns True, training stops with a checkpoint."""


ALONE = Trial()
"""Settings of a training that belongs to no sweep."""


def make_tracker(directory: Path, spec: JobSpec, status: Mapping[str, Any] | None, trial: Trial) -> Tracker:
    """Return the tracker of a run, which goes on in the MLflow runs of an earlier start.

    Args:
        directory: the run directory.
        status: content of the status file, if the run goes on from an earlier start.
    """
    return Tracker(
        spec.tracking.uri or sqlite_uri(directory.parent / "mlflow.db"),
        spec.tracking.experiment,
        spec.name,
        params={key: value for key, value in dump_spec(spec).items() if key != "tasks"} | dict(trial.params),
        tasks=task_params(spec),
        folder=directory,
        send_later=f"multitask track {quote(str(directory))}",
        spec_text=dump_yaml(spec),
        parent_run_id=trial.parent_run_id,
        resume_run_id=None if status is None else status["mlflow_run_id"],
        task_runs=None if status is None else status["mlflow_task_runs"],
    )


def task_params(spec: JobSpec) -> dict[str, dict[str, Any]]:
    """Return task -> its MLflow params."""
    return {task["name"]: task for task in dump_spec(spec)["tasks"]}
