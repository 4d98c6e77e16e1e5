"""Files through which other processes see how a run stands, and ask its driver to add or remove a task."""

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multitask.run.directory import write_json
from multitask.run.files import STATUS_REMEDY, RunError, checked_status, read_json
from multitask.run.paths import absolute
from multitask.spec.errors import SpecError
from multitask.spec.reading import dump_spec, load_spec
from multitask.spec.schema import JobSpec
from patches.files import read_regular
from patches.quoting import shortened
from patches.strict_json import parse_json

STATUS = "status.json"
REQUESTS = "requests"
"""Folder of the requests and their answers in the run directory."""
WRITE_EVERY_S = 1.0
"""Shortest time between two writes of the status file."""
BEAT_S = 10.0
"""Longest time between two writes, also while the driver waits for nodes or writes a checkpoint."""
SILENT_S = 60.0
"""Time without a write after which a driver on another machine counts as lost."""
POLL_S = 0.2
"""Time between two looks at a file that another process writes."""
REQUEST_BYTES = 1 << 20
"""Largest size of a request."""
ANSWER_CHARS = 1000
"""Greatest length of the error in an answer."""

log = logging.getLogger(__name__)


class LiveStatus:
    """The status file, which the driver writes: the run's state, and the progress and the faults of each task."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / STATUS
        self._content: Mapping[str, Any] = {}
        self._written = -WRITE_EVERY_S
        self._fails: bool | None = None
        """Whether the last write failed; None before the first one."""
        self._lock = threading.Lock()
        process = os.getpid()
        self._writer = {"process": process, "process_start": _start_of(process), "host": socket.gethostname()}

    def write(self, content: Mapping[str, Any], *, now: bool = False) -> None:
        """Replace the file's content. A file that cannot be written later ends no run: a warning says so, once.

        Args:
            now: write at once; otherwise the file is written at most once a second.
        Raises:
            OSError: the file cannot be written for the first time.
        """
        with self._lock:
            if now or time.monotonic() - self._written >= WRITE_EVERY_S:
                self._content = content
                self._write()

    def _write(self) -> None:
        try:
            write_json(self._path, {**self._content, **self._writer, "updated": time.time()})
        except OSError as error:  # the next write tries again
            if self._fails is None:
                raise
            if not self._fails:
                log.warning("The status cannot be written, so that it shows an earlier state: %s", error)
            self._fails = True
        else:
            self._fails = False
        self._written = time.monotonic()

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """While the block runs, write the last content again whenever nothing was written for `BEAT_S`."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT_S):
                with self._lock:
                    if self._content and time.monotonic() - self._written >= BEAT_S:
                        self._write()

        thread = threading.Thread(target=beat, name="status", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def read_status(directory: Path) -> dict[str, Any]:
    """Read a run's status file, and judge it with `judge_status`.

    Raises:
        RunError: no run was started in this directory, or its status file is damaged.
    """
    path = directory / STATUS
    if not path.exists():
        raise RunError(
            f"'{directory}' holds no run ({STATUS} is missing). Name a directory that `multitask train` uses."
        )
    return judge_status(read_json(path, STATUS_REMEDY), path)


def judge_status(status: Any, where: str | Path) -> dict[str, Any]:
    """Complete the content of a status file with `silent_s`, the seconds since it was written, and with lost drivers.

    The state "running" becomes "lost" if the driver's process on this machine is gone, or if a driver on another
    machine has not written for a minute. Keys of version 0.1 get their present names.

    Args:
        where: name of the file in messages.
    Raises:
        RunError: the content is not that of a status file.
    """
    judged = checked_status(status, where)
    judged["silent_s"] = max(0.0, time.time() - judged["updated"])
    if judged["state"] == "running" and not _is_alive(judged):
        judged["state"] = "lost"
    return judged


def _is_alive(status: Mapping[str, Any]) -> bool:
    if status["host"] != socket.gethostname():
        return bool(status["silent_s"] <= SILENT_S)
    try:
        os.kill(status["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the process exists and belongs to another user
        pass
    return _start_of(status["process"]) in (None, status.get("process_start"))


def _start_of(process: int) -> int | None:
    """Return when a process of this machine started, in clock ticks since the machine did.

    A process id may be used again, above all in a restarted container, but not together with the same start time. The
    result is None if the system does not tell the time.

    Source: field 22 of /proc/PID/stat, proc_pid_stat(5).
    """
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])  # the command's name before it may have spaces


@dataclass(frozen=True)
class Request:
    """A request to change the tasks of a running job."""

    path: Path
    attach: dict[str, Any] | None
    """Task to add, with the keys of a job spec's task; None in a request to remove one."""
    remove: str | None
    """Name of the task to remove; None in a request to add one."""


def changed_spec(spec: JobSpec, request: Request) -> JobSpec:
    """Return the job's spec after a request that adds or removes a task, with absolute paths as from the start.

    Raises:
        SpecError: the change cannot be made.
    """
    content = dump_spec(spec)
    names = [task.name for task in spec.tasks]
    if request.attach is not None:
        content["tasks"] = [*content["tasks"], request.attach]
    if request.remove is not None:
        if request.remove not in names:
            raise SpecError(f"the run has no task '{request.remove}', only {names}.")
        content["tasks"] = [task for task in content["tasks"] if task["name"] != request.remove]
    return absolute(load_spec(content))


class Requests:
    """The requests in a run directory.

    Anybody may have written the files, so nothing in them can stop the run: what is no request is answered with an
    error and set aside, under another ending.
    """

    def __init__(self, directory: Path) -> None:
        self._folder = directory / REQUESTS
        self._settled: set[str] = set()
        """Names of the files that were dealt with and could not be removed."""

    def waiting(self) -> list[Request]:
        """Return the requests that are not answered yet, the oldest first."""
        found = []
        for path in self._paths():
            try:
                found.append((path.lstat().st_mtime, _read_request(path)))
            except FileNotFoundError:  # the process that asked has removed its request
                continue
            except (OSError, ValueError) as error:
                self._settle(path, f"'{path.name}' is no request: {shortened(error)}")
        return [request for _, request in sorted(found, key=lambda one: one[0])]

    def answer(self, request: Request, error: str | None = None) -> None:
        """Answer that the change was made, or give the error that prevented it."""
        self._settle(request.path, error and error[:ANSWER_CHARS], remove=True)

    def _paths(self) -> list[Path]:
        if self._folder.is_symlink():  # files elsewhere are none of this run's
            return []
        try:
            names = os.listdir(self._folder)
        except OSError:  # nobody has asked for anything, or something else has the folder's name
            return []
        return [self._folder / name for name in names if name.endswith(".json") and name not in self._settled]

    def _settle(self, path: Path, error: str | None, *, remove: bool = False) -> None:
        """Write an answer, and remove the request or set it aside."""
        try:
            write_json(path.with_suffix(".answer"), {"error": error})
        except OSError as problem:
            log.warning("A request cannot be answered: %s", problem)
        try:
            if remove:
                path.unlink(missing_ok=True)  # the process that asked may have removed its request
            else:
                log.warning("%s. It is set aside.", error)
                path.rename(path.with_suffix(".rejected"))
        except OSError as problem:
            log.warning("A request cannot be removed, and is not read again: %s", problem)
            self._settled.add(path.name)


def _read_request(path: Path) -> Request:
    """Read a request.

    Raises:
        FileNotFoundError: it was removed.
        OSError, ValueError: the file is not a request.
    """
    content = parse_json(read_regular(path, REQUEST_BYTES))
    if not isinstance(content, dict) or content.keys() - {"attach", "remove"}:
        raise ValueError("expected the keys 'attach' and 'remove'")
    attach, remove = content.get("attach"), content.get("remove")
    if (attach is None) == (remove is None):
        raise ValueError("expected a value for either 'attach' or 'remove'")
    if not isinstance(attach, dict | None) or not isinstance(remove, str | None):
        raise ValueError("expected a task under 'attach', or a name under 'remove'")
    return Request(path, attach, remove)


def ask(directory: Path, *, attach: Mapping[str, Any] | None = None, remove: str | None = None) -> None:
    """Ask a running job to add or to remove a task, and wait for its answer.

    Raises:
        RunError: the job is not running, or the change cannot be made. The message says why.
    """
    state = read_status(directory)["state"]
    if state != "running":
        raise RunError(
            f"The run in '{directory}' is {state}. Tasks are added to and removed from running jobs only; "
            f"`multitask resume {directory}` resumes a job that stopped."
        )
    path = directory / REQUESTS / f"{uuid.uuid4().hex}.json"
    try:
        write_json(path, {"attach": attach and dict(attach), "remove": remove})
    except OSError as error:
        raise RunError(
            f"The run in '{directory}' goes on unchanged, because the request cannot be written: {error}. Put a folder "
            f"that can be written in the place of '{path.parent}'."
        ) from error
    answer = path.with_suffix(".answer")
    while not answer.is_file():
        time.sleep(POLL_S)
        state = read_status(directory)["state"]
        if state != "running" and not answer.is_file():
            path.unlink(missing_ok=True)
            raise RunError(f"The run in '{directory}' is {state} and did not make the change.")
    refused = read_json(answer, "See `multitask status` for whether the change was made.")["error"]
    answer.unlink()
    if refused:
        raise RunError(f"The run in '{directory}' goes on unchanged: {refused}")
