"""Outcomes of the trials of a sweep, read from their run directories; the choice among them; tables of all trials."""

import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from multitask.run.directory import write_spec
from multitask.run.files import RESULT_REMEDY, RunResult, checked, read_json
from multitask.run.live import STATUS, read_status
from multitask.spec.schema import JobSpec
from multitask.sweep.plan import TrialPlan, short_names
from patches.files import write_atomic

State = Literal["waiting", "running", "finished", "stopped", "failed", "lost"]
Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class TrialOutcome:
    """What is known of one trial, which may still be running."""

    plan: TrialPlan
    state: State
    """`stopped` means by the scheduler or together with the sweep; `lost` means that its process is gone."""
    curve: Curve = ()
    """(round, mean validation top-1 of the tasks in percent) of each evaluation, in order."""
    trained_parameters: int | None = None
    """Number of trained parameters of all tasks together; known once the trial has finished."""
    seconds: float | None = None
    """Duration of the training; known once the trial has finished."""
    mlflow_run_id: str | None = None
    error: str | None = None

    @property
    def top1(self) -> float | None:
        """Top-1 of the best evaluation in percent, which is that of the version that a run keeps as `best`."""
        return max((value for _, value in self.curve), default=None)

    @property
    def rounds(self) -> int:
        """Round of the last evaluation."""
        return max((number for number, _ in self.curve), default=0)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A setting that may be chosen, because all its trials have finished."""

    trial: TrialPlan
    """The first trial of the setting."""
    top1: float
    """Percent on validation images, mean over the setting's trials."""
    trials: int
    """Number of the setting's trials."""
    trained_parameters: int


def read_outcome(plan: TrialPlan) -> TrialOutcome:
    """Read the outcome of a trial from the files that it has written.

    Raises:
        RunError: one of the files is damaged.
    """
    failure = failure_file(plan)
    error = failure.read_text(errors="replace") if failure.is_file() else None
    if not (plan.directory / STATUS).is_file():
        return TrialOutcome(plan=plan, state="waiting" if error is None else "failed", error=error)
    status = read_status(plan.directory)
    outcome = TrialOutcome(
        plan=plan,
        # A trial writes its result after its status. If there is no result, the process was lost between the two.
        state="lost" if status["state"] == "finished" else status["state"],
        curve=_mean_curve(status["tasks"]),
        mlflow_run_id=status["mlflow_run_id"],
        error=error or status["error"],
    )
    result = plan.directory / "result.json"
    if not result.is_file():
        return replace(outcome, state="failed") if error is not None else outcome
    found = checked(RunResult, read_json(result, RESULT_REMEDY), result, RESULT_REMEDY)
    trained, seconds = found.trained_parameters, found.seconds
    return replace(outcome, state="finished", trained_parameters=trained, seconds=seconds, error=None)


def failure_file(plan: TrialPlan) -> Path:
    """Return the file in which a trial records why it failed. It lies beside the run directory, which may not exist."""
    return plan.directory.with_suffix(".error")


def choices(outcomes: Sequence[TrialOutcome]) -> list[Choice]:
    """Return the settings whose trials have all finished, in the order of the sweep."""
    by_setting: dict[int, list[TrialOutcome]] = defaultdict(list)
    for outcome in outcomes:
        by_setting[outcome.plan.setting].append(outcome)
    found = []
    for trials in by_setting.values():
        accuracies = [trial.top1 for trial in trials if trial.state == "finished" and trial.top1 is not None]
        if len(accuracies) == len(trials):
            about = {"trials": len(trials), "trained_parameters": trials[0].trained_parameters or 0}
            found.append(Choice(trial=trials[0].plan, top1=mean(accuracies), **about))
    return found


def choose(outcomes: Sequence[TrialOutcome]) -> Choice | None:
    """Return the setting with the highest validation accuracy as the mean over its trials, all of which have finished.

    Among equal settings, the one with the fewest trained parameters is chosen, and then the first.
    """
    return min(choices(outcomes), key=lambda choice: (-choice.top1, choice.trained_parameters), default=None)


def winning_spec(choice: Choice, sweep: str, directory: Path, name: str = "best") -> JobSpec:
    """Return the chosen trial's job with another name and directory; all else is equal, so that it gives equal bits.

    Args:
        sweep: name of the sweep.
        directory: directory of the sweep.
        name: name of the job's folder in `directory`.
    """
    spec = choice.trial.spec
    checkpoints = spec.checkpoints
    if checkpoints.uri is not None:
        checkpoints = replace(checkpoints, uri=f"{checkpoints.uri.rpartition('/')[0]}/{name}")
    return replace(spec, name=f"{sweep}_{name}", directory=str(directory / name), checkpoints=checkpoints)


def rows(outcomes: Sequence[TrialOutcome]) -> list[dict[str, Any]]:
    """Return a flat row for each trial: its setting, then its outcome."""
    found = []
    for outcome in outcomes:
        names = short_names(list(outcome.plan.values))
        setting = {f"setting_{names[key]}": value for key, value in outcome.plan.values.items()}
        found.append(
            {
                "trial": outcome.plan.number,
                **setting,
                "seed": outcome.plan.spec.seed,
                "state": outcome.state,
                "validation_top1": outcome.top1,
                "rounds": outcome.rounds,
                "trained_parameters": outcome.trained_parameters,
                "seconds": outcome.seconds,
                "directory": str(outcome.plan.directory),
                "mlflow_run_id": outcome.mlflow_run_id,
                "error": outcome.error,
            }
        )
    return found


def write_tables(outcomes: Sequence[TrialOutcome], directory: Path) -> list[Path]:
    """Write trials.csv and trials.parquet with the same rows, and return their paths."""
    found = rows(outcomes)
    table = pa.table({name: _column([row[name] for row in found]) for name in found[0]})
    files = {}
    for name, write in (("trials.csv", pyarrow.csv.write_csv), ("trials.parquet", pq.write_table)):
        buffer = io.BytesIO()
        write(table, buffer)
        files[directory / name] = buffer.getvalue()
    for path, content in files.items():
        write_atomic(path, content)
    return list(files)


def write_winner(choice: Choice, sweep: str, directory: Path) -> Path:
    """Write best.yaml, which `multitask train` can run, and return its path."""
    path = directory / "best.yaml"
    write_spec(path, winning_spec(choice, sweep, directory))
    return path


def _column(values: Sequence[Any]) -> pa.Array:
    """Return a column of numbers or texts; values of another kind, or of several kinds, become texts."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and len(kinds) == 2:
        values = [None if value is None else float(value) for value in values]
    elif len(kinds) > 1 or not kinds <= {bool, int, float, str}:
        values = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return pa.array(values)


def _mean_curve(tasks: Mapping[str, Any]) -> Curve:
    """Return the mean of the tasks' curves over the evaluations that all tasks have."""
    points: dict[int, list[float]] = defaultdict(list)
    for task in tasks.values():
        for point in task["curve"]:
            points[int(point["step"])].append(point["top1"])
    return tuple((step, mean(values)) for step, values in sorted(points.items()) if len(values) == len(tasks))
