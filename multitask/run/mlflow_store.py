"""The MLflow side of a run: it opens the MLflow runs, and stores records in them. Only this module imports mlflow.

Importing MLflow takes seconds, and so does creating the tables of a new SQLite file. Both happen only when the first
records are sent. The module uses only `MlflowClient`, without an active run or a global URI, so that many threads and
processes may send at once.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import sqlite3
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from multitask.run.records import Artifact, End, Lost, Metrics, Open, Point, Record, Tag, Text

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARAM_CHARS = 6000  # longest value of a param that MLflow accepts
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own tag, by which its pages nest runs
TASK_TAG = "multitask.task"
KEY_TAG = "multitask.key"
"""Tag with a key of our own, by which a run is found whose opening was not answered."""
HTTP_RETRIES = "2"
"""MLflow's own retries of a request. Its default of 7 takes minutes, and what fails is sent again anyway."""

log = logging.getLogger(__name__)


class TrackingError(ValueError):
    """MLflow cannot be used as the job asks. The message says why and what to do."""


class MlflowStore:
    """The run of a training in MLflow, with a child run for each task. A run is opened when the first record needs it.

    Apart from errors of MLflow, every method may raise a TrackingError.
    """

    def __init__(
        self,
        uri: str,
        database: Path | None,
        *,
        experiment: str,
        run_name: str,
        params: Mapping[str, str],
        task_params: Mapping[str, Mapping[str, str]],
        folder: Path,
        parent_run_id: str | None,
        run_id: str | None,
    ) -> None:
        """Args:
        uri, database: as `resolve` returns them.
        params, task_params: params of the run and of each task, flat. Tasks may be added later.
        folder: folder of relative paths in records.
        run_id: id of the run to go on with, if there is one.
        """
        self._uri, self._database = uri, database
        self.artifacts = artifacts_beside(database)
        self._experiment, self._run_name = experiment, run_name
        self._params, self._task_params = params, task_params
        self._folder = folder
        self._parent_run_id, self._run_id = parent_run_id, run_id
        self._keys: dict[str | None, str] = {}
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self.runs: dict[str | None, str] = {}
        """Task -> id of its run; None -> id of the run itself."""

    def send(self, records: Sequence[Record]) -> None:
        """Store records, the earliest first. If that fails, all of them may be sent again."""
        self._connect()
        for kind, group in groupby(records, type):
            if kind is Metrics:
                self._send_metrics(group)  # type: ignore[arg-type]
                continue
            for record in group:
                self._send_one(record)

    def _connect(self) -> None:
        """Connect to MLflow, once, and find or create the experiment."""
        if self._client is not None:
            if self._database is not None and not self._database.exists():
                # SQLite would create an empty file, in which MLflow finds nothing.
                raise FileNotFoundError(f"the file '{self._database}' is gone")
            return
        client = _connect(self._uri, self._database)
        self._experiment_id = _experiment_id(client, self._experiment, self.artifacts)
        if self._parent_run_id is not None:
            _check_parent(client, self._parent_run_id, self._experiment_id, self._uri)
        self._client = client

    def _send_metrics(self, records: Iterable[Metrics]) -> None:
        from mlflow.entities import Metric

        points: defaultdict[str | None, list[Point]] = defaultdict(list)
        for record in records:
            points[record.task] += record.points
        for task, values in points.items():
            metrics = [Metric(name, math.nan if value is None else value, ms, step) for name, value, ms, step in values]
            self._opened().log_batch(self._run_of(task), metrics=metrics)  # MLflow divides them into calls of 1000

    def _send_one(self, record: Record) -> None:
        client = self._opened()
        match record:
            case Open():
                self._open(record)
            case Tag():
                client.set_tag(self._run_of(record.task), record.name, record.value)
            case Text():
                self._send_text(self._run_of(None), record.name, record.text)
            case Artifact():
                self._send_artifact(record)
            case End():
                self._run_of(None)
                # The children end first, so that no child of an ended run is still running.
                for run_id in reversed(self.runs.values()):
                    client.set_terminated(run_id, record.status, record.time_ms)
            case Lost():
                found = client.get_run(record.run_id)
                for run_id in (*self._children(found).values(), record.run_id):
                    client.set_terminated(run_id, "FAILED")

    def _send_text(self, run_id: str, name: str, text: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            path.write_text(text, encoding="utf-8")
            self._artifacts_of(run_id).log_artifact(str(path))

    def _artifacts_of(self, run_id: str) -> Any:
        """Return the repository of a run's artifacts. The client's own stays at the place where it was used first."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        return get_artifact_repository(self._opened().get_run(run_id).info.artifact_uri, tracking_uri=self._uri)

    def _send_artifact(self, record: Artifact) -> None:
        path = self._folder / record.path
        if path.is_dir():
            self._artifacts_of(self._run_of(record.task)).log_artifacts(str(path), path.name)
        elif path.exists():
            self._artifacts_of(self._run_of(record.task)).log_artifact(str(path))
        else:
            log.warning("MLflow does not get '%s', which was removed before it was sent.", path)

    def _open(self, record: Open) -> None:
        """Mark the known runs as running, and open those that are missing."""
        self._find()
        for run_id in self.runs.values():
            self._opened().update_run(run_id, status="RUNNING")
        for task in (None, *record.tasks):
            self._run_of(task, record.time_ms)

    def _run_of(self, task: str | None, time_ms: int | None = None) -> str:
        """Return the id of a task's run, or of the run itself for None. It is opened if it does not exist."""
        self._find()
        if task is not None and None not in self.runs:
            self._create(None, time_ms)
        if task not in self.runs:
            self._create(task, time_ms)
        return self.runs[task]

    def _find(self) -> None:
        """Find the run to go on with, and its child runs, unless that is done."""
        from mlflow.exceptions import MlflowException

        if self._run_id is None or self.runs:
            return
        try:
            found = self._opened().get_run(self._run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            found = None
        if found is None or found.info.lifecycle_stage != "active":
            log.warning(
                "MLflow at %s does not have run %s, in which run '%s' was tracked so far: a new MLflow run begins.",
                self._uri,
                self._run_id,
                self._run_name,
            )
            self._run_id = None
            return
        self.runs = {None: self._run_id, **self._children(found)}

    def _children(self, run: Any) -> dict[str | None, str]:
        children = self._opened().search_runs([run.info.experiment_id], f"tags.`{PARENT_TAG}` = '{run.info.run_id}'")
        return {c.data.tags[TASK_TAG]: c.info.run_id for c in children if c.data.tags.get(TASK_TAG)}

    def _create(self, task: str | None, time_ms: int | None) -> None:
        """Open a run. It is opened once, also if an earlier attempt was not answered."""
        from mlflow.entities import Param

        client, earlier = self._opened(), task in self._keys
        key = self._keys.setdefault(task, uuid.uuid4().hex)
        found = client.search_runs([self._experiment_id], f"tags.`{KEY_TAG}` = '{key}'") if earlier else []
        if found:
            run_id = found[0].info.run_id
        else:
            parent = self._parent_run_id if task is None else self.runs[None]
            tags = {KEY_TAG: key} | ({} if parent is None else {PARENT_TAG: parent})
            tags |= {} if task is None else {TASK_TAG: task}
            name = self._run_name if task is None else task
            run_id = client.create_run(self._experiment_id, time_ms, tags, name).info.run_id
        params = self._params if task is None else self._task_params.get(task, {})
        client.log_batch(run_id, params=[Param(name, shorten(value)) for name, value in params.items()])
        if any(len(value) > PARAM_CHARS for value in params.values()):
            self._send_text(run_id, "params.json", json.dumps(params, indent=2, ensure_ascii=False))
        self.runs[task] = run_id

    def _opened(self) -> "MlflowClient":
        assert self._client is not None
        return self._client


def shorten(value: str) -> str:
    """Cut a value that is too long for MLflow, and append a mark with its full length."""
    if len(value) <= PARAM_CHARS:
        return value
    mark = f" ... [{len(value)} characters, whole in params.json]"
    return value[: PARAM_CHARS - len(mark)] + mark


def artifacts_beside(database: Path | None) -> Path | None:
    """Return the folder of the artifacts of an SQLite file; None for a tracking server, which has its own."""
    return database and database.with_name(f"{database.stem}-artifacts")


def resolve(uri: str) -> tuple[str, Path | None]:
    """Make the path in an SQLite URI absolute, so that every process uses the same file.

    Returns:
        The URI, and the path of the file; None for a tracking server.
    Raises:
        TrackingError: the URI is neither an SQLite file nor a tracking server.
    """
    if uri.startswith(("http://", "https://", "databricks")):
        return uri, None
    path_text, _, options = uri.removeprefix("sqlite:///").partition("?")
    if not uri.startswith("sqlite:///") or path_text in ("", ":memory:"):
        is_folder = uri.startswith("file:") or ":" not in uri
        found = "names a folder, and MLflow no longer writes to its file store" if is_folder else "is not supported"
        raise TrackingError(
            f"Tracking URI '{uri:.200}' {found}. Give a SQLite file, as in sqlite:///runs/mlflow.db (four slashes "
            "before an absolute path), or the http(s) address of a tracking server."
        )
    path = Path(path_text).expanduser().resolve()
    return sqlite_uri(path) + (f"?{options}" if options else ""), path


def sqlite_uri(path: Path) -> str:
    """Return the URI of an SQLite file.

    Raises:
        TrackingError: the path has characters with a meaning of their own in a URI. SQLAlchemy reads `%20` as a blank
            and `?` as the end of the path, and MLflow makes folders with the path as it is written.
    """
    if "?" in str(path) or unquote(str(path)) != str(path):
        raise TrackingError(
            f"MLflow cannot use the file '{path!s:.200}', because it reads '?' and codes such as '%20' in the path "
            "as parts of a URI. Rename the directory, or set tracking.uri to a file in another one."
        )
    return f"sqlite:///{path}"


def _connect(uri: str, database: Path | None) -> "MlflowClient":
    """Connect to MLflow with a client that prints nothing and sends no usage data, unless the environment says so."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow would print a URL at the end of a run on a server, but stdout belongs to the command, which may print JSON.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", HTTP_RETRIES)
    from mlflow import MlflowClient

    if "MLFLOW_LOGGING_LEVEL" not in os.environ:  # after the import, because it sets levels itself
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    if database is not None and not database.exists():
        _create_database(database)
    elif database is not None:
        _follow_move(database)
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


def _follow_move(database: Path) -> None:
    """Make an SQLite file that was moved together with its artifacts name the artifacts' new folder.

    MLflow stores absolute locations, and has no call to change them. Without this, a run in the moved folder would
    write its artifacts to the old one.
    """
    artifacts = artifacts_beside(database)
    assert artifacts is not None
    here = artifacts.as_uri()
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for (old,) in connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall():
            if old and old != here and old.startswith("file://") and old.endswith(f"/{artifacts.name}"):
                connection.execute(
                    "UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (here, old)
                )
                connection.execute(
                    "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) WHERE substr(artifact_uri, 1, ?) = ?",
                    (here, len(old) + 1, len(old) + 1, f"{old}/"),
                )


def _experiment_id(client: "MlflowClient", name: str, artifacts: Path | None) -> str:
    """Return the id of an experiment, which is created if it is missing."""
    from mlflow.exceptions import MlflowException

    location = None if artifacts is None else artifacts.as_uri()
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)  # another process was first
    assert experiment is not None
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"Experiment '{name}' was deleted. Bring it back with `mlflow experiments restore -x "
            f"{experiment.experiment_id}`, or use another name."
        )
    return str(experiment.experiment_id)


def _check_parent(client: "MlflowClient", parent_run_id: str, experiment_id: str, uri: str) -> None:
    """Check that a parent run exists and belongs to the experiment."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_run(parent_run_id).info.experiment_id
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise TrackingError(
            f"Parent run '{parent_run_id}' is not in {uri}: {error.message}. "
            "Pass the run_id of a tracker that uses the same URI."
        ) from error
    if found != experiment_id:
        raise TrackingError(
            f"Parent run '{parent_run_id}' is in experiment {found}, this run in {experiment_id}, and MLflow nests "
            "runs within one experiment only. Use the parent's experiment."
        )
