"""Tracking in MLflow: one run per training, with a child run per task.

A tracker only notes what happens: the notes go to a file, and a thread of its own sends them. So trouble with MLflow
neither delays a training nor ends it.
"""

import json
import logging
import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from multitask.run.mlflow_store import MlflowStore, TrackingError, artifacts_beside, resolve
from multitask.run.outbox import OUTBOX, Outbox, Sender, in_short
from multitask.run.records import Artifact, End, Lost, Metrics, Open, Point, Status, Tag, Text

TAG_CHARS = 8000
NON_FINITE_TAG = "multitask.non_finite"
START_S = 120.0
"""Longest wait for MLflow's first answer. On a busy machine its import and a new SQLite file take a minute."""
END_S = 30.0
"""Longest wait at the end of a training, while MLflow takes none of the last records."""
AGAIN_S = 5.0
"""Time in which these two are tried again, if MLflow cannot be reached."""

log = logging.getLogger(__name__)


class Tracker:
    """Record a training in MLflow: `with Tracker(...) as tracker: tracker.log_steps("pets", records)`.

    Leaving the block ends the run and its children as FINISHED, on KeyboardInterrupt as KILLED and on any other
    exception as FAILED. If MLflow cannot be reached, at the start or later, a warning says so and the training goes on:
    the records wait in a file, and are sent as soon as MLflow can be reached again, or by `send_waiting`.

    Args:
        tracking_uri: an SQLite file such as `sqlite:///runs/mlflow.db`, whose folders are created and whose artifacts
            go to `runs/mlflow-artifacts`; or the http(s) address of a tracking server.
        experiment: name of the MLflow experiment, which is created if it is missing.
        run_name: name of the run in MLflow; several runs may have the same name.
        params: settings of the whole run. Nested mappings become names with dots. A value that is too long for MLflow
            is cut and marked; the artifact `params.json` then has all params in full.
        tasks: task name -> its params. Each task gets a child run with its name. A task that is added under the name of
            one that was removed gets a child run of its own, `pets (2)`.
        folder: folder of the file with the records that wait; by default a new temporary folder.
        send_later: the command that sends the records that wait, for the warning at the end.
        spec_text: the text of the job spec, which is kept as the artifact `spec.yaml`.
        parent_run_id: id of an existing run that becomes the parent of this run, for example that of a sweep.
        resume_run_id: id of an existing run to go on with, together with its child runs. New tasks get new child runs.
            If it does not exist, a warning says so and a new run begins.
        task_runs: task name -> the number of child runs of this name in the run to go on with; a task goes on in the
            last one.
    Raises:
        TrackingError: MLflow cannot use the URI or the experiment; or, on entering, the experiment was deleted or the
            parent is unknown.
        ValueError: two params get the same name.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment: str,
        run_name: str,
        *,
        params: Mapping[str, Any],
        tasks: Mapping[str, Mapping[str, Any]],
        folder: Path | None = None,
        send_later: str = "the same command",
        spec_text: str | None = None,
        parent_run_id: str | None = None,
        resume_run_id: str | None = None,
        task_runs: Mapping[str, int] | None = None,
    ) -> None:
        self.tracking_uri, database = resolve(tracking_uri)
        self.artifacts = artifacts_beside(database)
        if experiment == "Default" and database is not None:
            raise TrackingError(
                "Experiment 'Default' is MLflow's own and keeps its artifacts in the working directory. Use another "
                "name."
            )
        self._run_name, self._send_later, self._spec_text = run_name, send_later, spec_text
        self._folder = Path(tempfile.mkdtemp(prefix="multitask-")) if folder is None else folder
        self.task_runs = dict.fromkeys(tasks, 1) | dict(task_runs or {})
        """Task name -> the number of child runs that tasks of this name have had; for the next start of the run."""
        self._names = {task: _child_name(task, self.task_runs[task]) for task in tasks}
        self._task_params = {self._names[task]: flatten(task_params) for task, task_params in tasks.items()}
        self._store = MlflowStore(
            self.tracking_uri,
            database,
            experiment=experiment,
            run_name=run_name,
            params=flatten(params),
            task_params=self._task_params,
            folder=self._folder,
            parent_run_id=parent_run_id,
            run_id=resume_run_id,
        )
        self._resume_run_id = resume_run_id
        self._outbox: Outbox | None = None
        self._non_finite: dict[str | None, dict[str, str]] = {}

    def __enter__(self) -> Self:
        if self._outbox is not None:
            raise RuntimeError(f"Tracker '{self._run_name}' was entered before. Make a new Tracker for each run.")
        outbox = Outbox(self._folder / OUTBOX)
        self._sender = Sender(outbox, self._store.send)
        self._sender.start()
        trouble = self._sender.flush(START_S)
        if isinstance(trouble, TrackingError):
            self._sender.stop()
            raise trouble
        self._outbox = outbox
        outbox.add(Open(tasks=list(self._names.values()), time_ms=_now_ms()))
        if self._spec_text is not None:
            outbox.add(Text(name="spec.yaml", text=self._spec_text))
        if not isinstance(trouble, TimeoutError):
            trouble = self._sender.settle(START_S, AGAIN_S)
        if trouble is not None:
            self._sender.warn(trouble)
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        status: Status = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        self._notes().add(End(status=status, time_ms=_now_ms()))
        try:
            trouble = self._sender.settle(END_S, AGAIN_S)
        except KeyboardInterrupt:
            trouble = TimeoutError("the wait for it was interrupted")
        self._sender.stop()
        if trouble is not None:
            log.warning("%s", self._missing(trouble))

    def send_waiting(self, lost: bool = False) -> int:
        """Send what waits in the file of an earlier process, and return the number of records.

        Args:
            lost: whether that process was killed, so that its run has to be marked as failed.
        Raises:
            TrackingError: MLflow does not take the records. They stay in the file.
        """
        outbox = Outbox(self._folder / OUTBOX)
        if lost:
            outbox.add(End(status="FAILED", time_ms=_now_ms()))
        count = 0
        try:
            while (taken := outbox.take()) is not None:
                records, place = taken
                self._store.send(records)
                outbox.sent(place)
                count += len(records)
        except TrackingError:
            raise
        except Exception as error:
            raise TrackingError(
                f"{outbox.waiting()} records of run '{self._run_name}' still wait in '{outbox.path}', because MLflow "
                f"at {self.tracking_uri} does not take them: {in_short(error)}. Try again when it does."
            ) from error
        return count

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, also after the block; None as long as MLflow could not be reached."""
        return self._store.runs.get(None, self._resume_run_id)

    def task_run_id(self, task: str) -> str | None:
        """MLflow's id of the task's child run, or None."""
        return self._store.runs.get(self._known(task))

    def track_tasks(self, tasks: Mapping[str, Mapping[str, Any]]) -> None:
        """Open a child run for each task that is new. The others go on in theirs.

        Args:
            tasks: task name -> its params, for all tasks that the run has from now on.
        """
        new = [task for task in tasks if task not in self._names]
        self._names = {task: name for task, name in self._names.items() if task in tasks}
        for task in new:
            self.task_runs[task] = self.task_runs.get(task, 0) + 1
            self._names[task] = _child_name(task, self.task_runs[task])
            self._task_params[self._names[task]] = flatten(tasks[task])
        self._notes().add(Open(tasks=[self._names[task] for task in new], time_ms=_now_ms()))

    def end_lost(self, run_id: str) -> None:
        """Mark another run and its child runs as failed, because the process that would end them is gone."""
        self._notes().add(Lost(run_id=run_id))

    def log_steps(self, task: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Record many steps of one task.

        Args:
            records: one mapping per step, with `step` (integer) and numbers such as `loss`, `rate`, `staleness` and
                `samples_per_s`. `timestamp_ms` (Unix time) may give the time of an earlier step. A number that is not
                finite is stored as NaN, which MLflow plots as a gap, and the run's tag `multitask.non_finite` names
                the first step with such a number.
        """
        now_ms = _now_ms()
        points = []
        for record in records:
            values = dict(record)
            if "step" not in values:
                raise ValueError(
                    f"A record of task '{task}' has no 'step', only {sorted(values)}. Give every record one."
                )
            step, when_ms = int(values.pop("step")), int(values.pop("timestamp_ms", now_ms))
            points += [_point(task, name, value, step, when_ms) for name, value in values.items()]
        self._add(task, points)

    def log_metrics(self, task: str | None, metrics: Mapping[str, Any], step: int) -> None:
        """Record values of a task at one step; with None as the task, values of the whole run."""
        now_ms = _now_ms()
        self._add(task, [_point(task, name, value, step, now_ms) for name, value in metrics.items()])

    def log_artifact(self, path: Path | str, task: str | None = None) -> None:
        """Copy a file or a directory to the artifacts of the run, or to those of one task."""
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"No file or directory '{path}' to log as an artifact. Write it before logging it.")
        path = path.resolve()
        if self.artifacts is not None and self.artifacts.is_relative_to(path):
            raise ValueError(
                f"Directory '{path}' holds the artifact store '{self.artifacts}' itself, so copying it there would "
                "never end. Log the files or the run's own directory inside it."
            )
        folder = self._folder.resolve()
        where = path.relative_to(folder) if path.is_relative_to(folder) else path
        self._notes().add(Artifact(task=self._known(task), path=str(where)))

    def _add(self, task: str | None, points: list[tuple[str, float, int, int]]) -> None:
        """Note numbers; those that are not finite become NaN, and a tag names the first one of each metric."""
        task = self._known(task)
        notes = self._non_finite.setdefault(task, {})
        known = len(notes)
        for name, number, _, step in points:
            if not math.isfinite(number):
                notes.setdefault(name, f"{name} is {number} from step {step}")
        if len(notes) > known:
            self._notes().add(Tag(task=task, name=NON_FINITE_TAG, value="; ".join(notes.values())[:TAG_CHARS]))
        # SQLite has no infinity: MLflow would store 1.8e308 and ruin the plot's axis.
        finite: list[Point] = [(n, x if math.isfinite(x) else None, when_ms, step) for n, x, when_ms, step in points]
        if finite:
            self._notes().add(Metrics(task=task, points=finite))

    def _known(self, task: str | None) -> str | None:
        """Return the name of a task's child run; None stands for the run itself."""
        if task is None:
            return None
        if task not in self._names:
            raise KeyError(
                f"Task '{task}' has no run in tracker '{self._run_name}', only {sorted(self._names)}. Pass it as "
                "`tasks`."
            )
        return self._names[task]

    def _notes(self) -> Outbox:
        if self._outbox is None:
            raise RuntimeError(f"Tracker '{self._run_name}' is not open. Use it as `with Tracker(...) as tracker:`.")
        return self._outbox

    def _missing(self, trouble: Exception) -> str:
        outbox = self._notes()
        return (
            f"{outbox.waiting()} records of run '{self._run_name}' are not in MLflow at {self.tracking_uri} "
            f"({in_short(trouble)}). They wait in {outbox.path}; when MLflow can be reached, send them with: "
            f"{self._send_later}"
        )


def _child_name(task: str, number: int) -> str:
    """Return the name of the child run of the n-th task of a name. A task's own name has no brackets."""
    return task if number == 1 else f"{task} ({number})"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _point(task: str | None, name: str, value: Any, step: int, when_ms: int) -> tuple[str, float, int, int]:
    try:
        return name, float(value), when_ms, step
    except (TypeError, ValueError) as error:
        whose = "the run" if task is None else f"task '{task}'"
        raise TypeError(
            f"Metric '{name}' of {whose} is {value!r} at step {step}, which is no number. "
            "Log numbers as metrics, and texts as params or artifacts."
        ) from error


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow's flat params: `{"data": {"size": 16}}` becomes `{"data.size": "16"}`.

    Lists become JSON. A character that MLflow refuses in a name, such as `+`, becomes `_`.

    Raises:
        ValueError: two settings get the same name.
    """
    pairs: list[tuple[str, str]] = []
    for key, value in params.items():
        name = prefix + re.sub(r"[^\w\-. :/]", "_", str(key))
        if isinstance(value, Mapping) and value:
            pairs += flatten(value, f"{name}.").items()
        elif isinstance(value, Mapping | list | tuple):
            pairs.append((name, json.dumps(value, default=str, ensure_ascii=False)))
        else:
            pairs.append((name, str(value)))
    twice = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    if twice:
        raise ValueError(
            f"Params {twice} come from more than one setting once nested names are joined. Rename one of each."
        )
    return dict(pairs)
