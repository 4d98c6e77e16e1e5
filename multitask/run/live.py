"""Files through which other processes see how a run stands, and ask its driver to add or remove a task."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multitask.run.directory import RunError, write_json
from multitask.server.progress import with_current_names

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


class LiveStatus:
    """The status file, which the driver writes: the run's state, and the progress and the faults of each task."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / STATUS
        self._content: Mapping[str, Any] = {}
        self._written = -WRITE_EVERY_S
        self._lock = threading.Lock()
        process = os.getpid()
        self._writer = {"process": process, "process_start": _start_of(process), "host": socket.gethostname()}

    def write(self, content: Mapping[str, Any], *, now: bool = False) -> None:
        """Replace the file's content.

        Args:
            now: write at once; otherwise the file is written at most once a second.
        """
        with self._lock:
            if now or time.monotonic() - self._written >= WRITE_EVERY_S:
                self._content = content
                self._write()

    def _write(self) -> None:
        write_json(self._path, {**self._content, **self._writer, "updated": time.time()})
        self._written = time.monotonic()

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """While the block runs, write the last content again whenever nothing was written for `BEAT_S`."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT_S):
                with self._lock, contextlib.suppress(OSError):  # the disk may be full; the next beat tries again
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
        RunError: no run was started in this directory.
    """
    path = directory / STATUS
    if not path.is_file():
        raise RunError(
            f"'{directory}' holds no run ({STATUS} is missing). Name a directory that `multitask train` uses."
        )
    return judge_status(json.loads(path.read_text()))


def judge_status(status: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the content of a status file with `silent_s`, the seconds since it was written, and with lost drivers.

    The state "running" becomes "lost" if the driver's process on this machine is gone, or if a driver on another
    machine has not written for a minute. Keys of version 0.1 get their present names.
    """
    judged = {**with_current_names(status), "silent_s": max(0.0, time.time() - status["updated"])}
    if "tasks" in judged:
        judged["tasks"] = {name: with_current_names(task) for name, task in judged["tasks"].items()}
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

    def answer(self, error: str | None = None) -> None:
        """Answer that the change was made, or give the error that prevented it."""
        write_json(self.path.with_suffix(".answer"), {"error": error})
        self.path.unlink(missing_ok=True)  # the process that asked may have removed its request


def requests(directory: Path) -> list[Request]:
    """Return the requests that are not answered yet, the oldest first."""
    found = []
    for path in (directory / REQUESTS).glob("*.json"):
        with contextlib.suppress(FileNotFoundError):  # the process that asked has removed its request
            found.append((path.stat().st_mtime, Request(path, **json.loads(path.read_text()))))
    return [request for _, request in sorted(found, key=lambda one: one[0])]


def ask(directory: Path, *, attach: Mapping[str, Any] | None = None, remove: str | None = None) -> None:
    """Ask a running job to add or to remove a task, and wait for its answer.

    Raises:
        RunError: the job is not running, or the change cannot be made. The message says why.
    """
    state = read_status(directory)["state"]
    if state != "running":
        raise RunError(
            f"The run in '{directory}' is {state}. Tasks are added to and removed from running jobs only; "
            f"`multitask train --resume {directory}` resumes a job that stopped."
        )
    (directory / REQUESTS).mkdir(exist_ok=True)
    path = directory / REQUESTS / f"{uuid.uuid4().hex}.json"
    write_json(path, {"attach": attach and dict(attach), "remove": remove})
    answer = path.with_suffix(".answer")
    while not answer.is_file():
        time.sleep(POLL_S)
        state = read_status(directory)["state"]
        if state != "running" and not answer.is_file():
            path.unlink(missing_ok=True)
            raise RunError(f"The run in '{directory}' is {state} and did not make the change.")
    error = json.loads(answer.read_text())["error"]
    answer.unlink()
    if error:
        raise RunError(f"The run in '{directory}' goes on unchanged: {error}")
