"""Tracking in MLflow: one run per training, with a child run per task. Only this module imports mlflow.

Importing MLflow takes seconds, and so does creating the tables of a new SQLite file. Both happen only when a Tracker is
entered. The module uses only `MlflowClient`, without an active run or a global URI, so that many threads and processes
may have trackers at once.
"""

import json
import logging
import math
import os
import re
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

PARAM_CHARS = 6000  # longest value of a param that MLflow accepts
TAG_CHARS = 8000
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own tag, by which its pages nest runs
TASK_TAG = "multitask.task"
NON_FINITE_TAG = "multitask.non_finite"
BUSY_RETRIES = 5  # tries while another process locks the SQLite file; MLflow waits 20 s in each of them

Answer = TypeVar("Answer")


class Tracker:
    """Record a training in MLflow: `with Tracker(...) as tracker: tracker.log_steps("pets", records)`.

    Leaving the block ends the run and its children as FINISHED, on KeyboardInterrupt as KILLED and on any other
    exception as FAILED.

    Args:
        tracking_uri: an SQLite file such as `sqlite:///runs/mlflow.db`, whose folders are created and whose artifacts
            go to `runs/mlflow-artifacts`; or the http(s) address of a tracking server.
        experiment: name of the MLflow experiment, which is created if it is missing.
        run_name: name of the run in MLflow; several runs may have the same name.
        params: settings of the whole run. Nested mappings become names with dots. A value that is too long for MLflow
            is cut and marked; the artifact `params.json` then has all params in full.
        tasks: task name -> its params. Each task gets a child run with its name.
        spec_text: the text of the job spec, which is kept as the artifact `spec.yaml`.
        parent_run_id: id of an existing run that becomes the parent of this run, for example that of a sweep.
        resume_run_id: id of an existing run to go on with, together with its child runs. New tasks get new child runs.
    Raises:
        ValueError: MLflow cannot use the URI; or, on entering, the experiment was deleted or the parent is unknown.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment: str,
        run_name: str,
        *,
        params: Mapping[str, Any],
        tasks: Mapping[str, Mapping[str, Any]],
        spec_text: str | None = None,
        parent_run_id: str | None = None,
        resume_run_id: str | None = None,
    ) -> None:
        self.tracking_uri, self._database = _resolve(tracking_uri)
        self.artifacts = self._database and self._database.with_name(f"{self._database.stem}-artifacts")
        self._experiment = experiment
        self._run_name = run_name
        self._params = params
        self._task_params = tasks
        self._spec_text = spec_text
        self._parent_run_id = parent_run_id
        self._resume_run_id = resume_run_id
        self._client: MlflowClient | None = None
        self._runs: dict[str | None, str] = {}  # task -> id of its child run; None -> id of the run itself
        self._non_finite: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if self._runs:
            raise RuntimeError(f"Tracker '{self._run_name}' was entered before. Make a new Tracker for each run.")
        self._client = _connect(self.tracking_uri, self._database)
        try:
            self._start()
        except BaseException as error:
            self._end(error)
            raise
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._end(error)

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; valid after the block too."""
        return self._run_of(None)

    def task_run_id(self, task: str) -> str:
        """MLflow's id of the task's child run."""
        return self._run_of(task)

    def add_tasks(self, tasks: Mapping[str, Mapping[str, Any]]) -> None:
        """Open a child run for each task that has none yet.

        Args:
            tasks: task name -> its params.
        """
        experiment_id = _patiently(lambda: self._client_now().get_run(self.run_id)).info.experiment_id
        for task, params in tasks.items():
            if task not in self._runs:
                self._open_run(task, experiment_id, task, params, self.run_id)

    def end_lost(self, run_id: str) -> None:
        """Mark another run and its child runs as failed, because the process that would end them is gone."""
        client = self._client_now()
        experiment_id = _patiently(lambda: client.get_run(run_id)).info.experiment_id
        children = _patiently(lambda: client.search_runs([experiment_id], f"tags.`{PARENT_TAG}` = '{run_id}'"))
        for found in (*(child.info.run_id for child in children), run_id):
            _patiently(lambda found=found: client.set_terminated(found, "FAILED"))  # type: ignore[misc]

    def log_steps(self, task: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Record many steps of one task in as few calls as MLflow allows.

        Args:
            records: one mapping per step, with `step` (integer) and numbers such as `loss`, `rate`, `staleness` and
                `samples_per_s`. `timestamp_ms` (Unix time) may give the time of an earlier step. A number that is not
                finite is stored as NaN, which MLflow plots as a gap, and the run's tag `multitask.non_finite` names
                the first step with such a number.
        """
        now_ms = time.time_ns() // 1_000_000
        metrics = []
        for record in records:
            values = dict(record)
            if "step" not in values:
                raise ValueError(
                    f"A record of task '{task}' has no 'step', only {sorted(values)}. Give every record one."
                )
            step, when_ms = int(values.pop("step")), int(values.pop("timestamp_ms", now_ms))
            metrics += [self._metric(task, name, value, step, when_ms) for name, value in values.items()]
        self._send(task, metrics)

    def log_metrics(self, task: str | None, metrics: Mapping[str, Any], step: int) -> None:
        """Record values of a task at one step; with None as the task, values of the whole run."""
        now_ms = time.time_ns() // 1_000_000
        self._send(task, [self._metric(task, name, value, step, now_ms) for name, value in metrics.items()])

    def log_artifact(self, path: Path | str, task: str | None = None) -> None:
        """Copy a file or a directory to the artifacts of the run, or to those of one task."""
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"No file or directory '{path}' to log as an artifact. Write it before logging it.")
        if self.artifacts is not None and self.artifacts.is_relative_to(path.resolve()):
            raise ValueError(
                f"Directory '{path}' holds the artifact store '{self.artifacts}' itself, so copying it there would "
                "never end. Log the files or the run's own directory inside it."
            )
        run_id = self._run_of(task)
        self._client_now().log_artifact(run_id, str(path))

    def _start(self) -> None:
        client = self._client_now()
        experiment_id = _experiment_id(client, self._experiment, self.artifacts)
        if self._parent_run_id is not None:
            _check_parent(client, self._parent_run_id, experiment_id, self.tracking_uri)
        if self._resume_run_id is None:
            self._open_run(None, experiment_id, self._run_name, self._params, self._parent_run_id)
        else:
            self._reopen(client, experiment_id, self._resume_run_id)
        if self._spec_text is not None:
            client.log_text(self.run_id, self._spec_text, "spec.yaml")
        self.add_tasks(self._task_params)

    def _reopen(self, client: "MlflowClient", experiment_id: str, run_id: str) -> None:
        """Find an existing run and its child runs, and mark them as running."""
        children = _patiently(lambda: client.search_runs([experiment_id], f"tags.`{PARENT_TAG}` = '{run_id}'"))
        self._runs = {None: run_id}
        self._runs |= {c.data.tags[TASK_TAG]: c.info.run_id for c in children if c.data.tags.get(TASK_TAG)}
        for found in self._runs.values():
            _patiently(lambda found=found: client.update_run(found, status="RUNNING"))  # type: ignore[misc]

    def _open_run(
        self, task: str | None, experiment_id: str, name: str, params: Mapping[str, Any], parent: str | None
    ) -> None:
        from mlflow.entities import Param

        client = self._client_now()
        tags = {} if parent is None else {PARENT_TAG: parent}
        if task is not None:
            tags[TASK_TAG] = task
        run_id = _patiently(lambda: client.create_run(experiment_id, tags=tags, run_name=name)).info.run_id
        self._runs[task] = run_id
        flat = flatten(params)
        entries = [Param(key, shorten(value)) for key, value in flat.items()]
        _patiently(lambda: client.log_batch(run_id, params=entries))
        if any(len(value) > PARAM_CHARS for value in flat.values()):
            client.log_text(run_id, json.dumps(flat, indent=2, ensure_ascii=False), "params.json")

    def _metric(self, task: str | None, name: str, value: Any, step: int, when_ms: int) -> "Metric":
        from mlflow.entities import Metric

        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"Metric '{name}' of {_whose(task)} is {value!r} at step {step}, which is no number. "
                "Log numbers as metrics, and texts as params or artifacts."
            ) from error
        if not math.isfinite(number):
            self._note_non_finite(task, name, number, step)
            number = math.nan  # SQLite has no infinity: MLflow would store 1.8e308 and ruin the plot's axis
        return Metric(name, number, when_ms, step)

    def _note_non_finite(self, task: str | None, name: str, number: float, step: int) -> None:
        run_id = self._run_of(task)
        with self._lock:
            notes = self._non_finite.setdefault(run_id, {})
            if name in notes:
                return
            notes[name] = f"{name} is {number} from step {step}"
            text = "; ".join(notes.values())[:TAG_CHARS]
        _patiently(lambda: self._client_now().set_tag(run_id, NON_FINITE_TAG, text))

    def _send(self, task: str | None, metrics: list["Metric"]) -> None:
        client, run_id = self._client_now(), self._run_of(task)
        _patiently(lambda: client.log_batch(run_id, metrics=metrics))  # MLflow divides them into calls of 1000

    def _run_of(self, task: str | None) -> str:
        if None not in self._runs:
            raise RuntimeError(f"Tracker '{self._run_name}' has no run yet. Use it as `with Tracker(...) as tracker:`.")
        if task not in self._runs:
            known = sorted(name for name in self._runs if name is not None)
            raise KeyError(f"Task '{task}' has no run in tracker '{self._run_name}', only {known}. Pass it as `tasks`.")
        return self._runs[task]

    def _client_now(self) -> "MlflowClient":
        if self._client is None:
            raise RuntimeError(f"Tracker '{self._run_name}' is not open. Use it as `with Tracker(...) as tracker:`.")
        return self._client

    def _end(self, error: BaseException | None) -> None:
        """End the child runs first and the run last, so that no child of an ended run is still running."""
        client, self._client = self._client, None
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        failure: Exception | None = None
        for run_id in reversed(self._runs.values()):
            try:
                _patiently(lambda run_id=run_id: client.set_terminated(run_id, status))  # type: ignore[misc,union-attr]
            except Exception as problem:
                failure = problem
        if failure is not None and error is None:
            raise failure
        if failure is not None and error is not None:  # the error that ended the run is more important than MLflow's
            error.add_note(f"MLflow could not mark run '{self._run_name}' as {status}: {failure}")


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


def shorten(value: str) -> str:
    """Cut a value that is too long for MLflow, and append a mark with its full length."""
    if len(value) <= PARAM_CHARS:
        return value
    mark = f" ... [{len(value)} characters, whole in params.json]"
    return value[: PARAM_CHARS - len(mark)] + mark


def _resolve(uri: str) -> tuple[str, Path | None]:
    """Make the path in an SQLite URI absolute, so that every process uses the same file.

    Returns:
        The URI, and the path of the file; None for a tracking server.
    Raises:
        ValueError: the URI is neither an SQLite file nor a tracking server.
    """
    if uri.startswith(("http://", "https://", "databricks")):
        return uri, None
    path_text, _, options = uri.removeprefix("sqlite:///").partition("?")
    if not uri.startswith("sqlite:///") or path_text in ("", ":memory:"):
        is_folder = uri.startswith("file:") or ":" not in uri
        found = "names a folder, and MLflow no longer writes to its file store" if is_folder else "is not supported"
        raise ValueError(
            f"Tracking URI '{uri}' {found}. Give a SQLite file, as in sqlite:///runs/mlflow.db (four slashes before an "
            "absolute path), or the http(s) address of a tracking server."
        )
    path = Path(path_text).resolve()
    return f"sqlite:///{path}" + (f"?{options}" if options else ""), path


def _connect(uri: str, database: Path | None) -> "MlflowClient":
    """Connect to MLflow with a client that prints nothing and sends no usage data, unless the environment says so."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow would print a URL at the end of a run on a server, but stdout belongs to the command, which may print JSON.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    if "MLFLOW_LOGGING_LEVEL" not in os.environ:  # after the import, because it sets levels itself
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    if database is not None and not database.exists():
        _create_database(database)
    return MlflowClient(tracking_uri=uri)


def _create_database(database: Path) -> None:
    """Create MLflow's tables in a temporary file, and move it to its final name when it is complete.

    MLflow creates the tables in place and without a lock. If two processes start together one of them fails with
    "duplicate column name", and a process that is killed meanwhile leaves a file that no later run can open.
    """
    from mlflow import MlflowClient

    database.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=database.parent) as folder:
        built, whole = Path(folder, "built.db"), Path(folder, "whole.db")
        MlflowClient(tracking_uri=f"sqlite:///{built}")
        shutil.copyfile(built, whole)  # MLflow keeps `built` open
        try:
            os.link(whole, database)
        except FileExistsError:
            pass  # another process was first; its file is as good
        except OSError:  # a file system without hard links
            if not database.exists():
                whole.rename(database)


def _experiment_id(client: "MlflowClient", name: str, artifacts: Path | None) -> str:
    """Return the id of an experiment, which is created if it is missing."""
    from mlflow.exceptions import MlflowException

    if name == "Default" and artifacts is not None:
        raise ValueError(
            "Experiment 'Default' is MLflow's own and keeps its artifacts in the working directory. Use another name."
        )
    location = None if artifacts is None else artifacts.as_uri()
    experiment = _patiently(lambda: client.get_experiment_by_name(name))
    if experiment is None:
        try:
            return _patiently(lambda: client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)  # another process was first
    assert experiment is not None
    if experiment.lifecycle_stage != "active":
        raise ValueError(
            f"Experiment '{name}' was deleted. Bring it back with `mlflow experiments restore -x "
            f"{experiment.experiment_id}`, or use another name."
        )
    return str(experiment.experiment_id)


def _check_parent(client: "MlflowClient", parent_run_id: str, experiment_id: str, uri: str) -> None:
    """Check that a parent run exists and belongs to the experiment."""
    from mlflow.exceptions import MlflowException

    try:
        found = _patiently(lambda: client.get_run(parent_run_id)).info.experiment_id
    except MlflowException as error:
        raise ValueError(
            f"Parent run '{parent_run_id}' is not in {uri}: {error.message}. "
            "Pass the run_id of a tracker that uses the same URI."
        ) from error
    if found != experiment_id:
        raise ValueError(
            f"Parent run '{parent_run_id}' is in experiment {found}, this run in {experiment_id}, and MLflow nests "
            "runs within one experiment only. Use the parent's experiment."
        )


def _patiently(call: Callable[[], Answer]) -> Answer:
    """Repeat a call while the database is busy. A repeated call is safe: MLflow stores the same value only once."""
    from mlflow.exceptions import MlflowException

    for attempt in range(BUSY_RETRIES):
        try:
            return call()
        except MlflowException as error:
            if error.error_code != "TEMPORARILY_UNAVAILABLE" or attempt == BUSY_RETRIES - 1:
                raise
            time.sleep(0.1 * 2**attempt)
    raise AssertionError("the loop returns or raises")


def _whose(task: str | None) -> str:
    return "the run" if task is None else f"task '{task}'"
