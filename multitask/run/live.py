"""What a running job shows, and what it is asked: files in its run directory, read and written by other processes."""

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
WRITE_EVERY_S = 1.0
BEAT_S = 10.0
"""A driver that has nothing to write, because it waits for nodes or writes a checkpoint, writes as often."""
SILENT_S = 60.0
"""A driver on another machine that has not written for so long is taken for dead."""
POLL_S = 0.2


class LiveStatus:
    """Written by the driver of a run: state, progress of each task, faults, the latest checkpoint."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / STATUS
        self._content: Mapping[str, Any] = {}
        self._written = -WRITE_EVERY_S
        self._lock = threading.Lock()
        process = os.getpid()
        self._writer = {"process": process, "process_start": _start_of(process), "host": socket.gethostname()}

    def write(self, content: Mapping[str, Any], *, now: bool = False) -> None:
        """Replace the file, at most once a second unless `now`."""
        with self._lock:
            if now or time.monotonic() - self._written >= WRITE_EVERY_S:
                self._content = content
                self._write()

    def _write(self) -> None:
        write_json(self._path, {**self._content, **self._writer, "updated": time.time()})
        self._written = time.monotonic()

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """While the block runs, a thread writes again what was written last, whenever that was some time ago."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT_S):
                with self._lock, contextlib.suppress(OSError):  # a full disk, perhaps: the next beat comes soon
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
    """What the driver wrote last, as `judge_status` sees it.

    Raises:
        RunError: nothing was started in this directory.
    """
    path = directory / STATUS
    if not path.is_file():
        raise RunError(
            f"'{directory}' holds no run ({STATUS} is missing). Name a directory that `multitask train` uses."
        )
    return judge_status(json.loads(path.read_text()))


def judge_status(status: Mapping[str, Any]) -> dict[str, Any]:
    """What a driver wrote, with `silent_s`, the seconds since it was written.

    A state that only a living driver has ("running") becomes "lost" where its process is gone, if another one has its
    id by now too, or, on another machine, was not heard of for a minute.
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
    except PermissionError:  # another user's
        pass
    return _start_of(status["process"]) in (None, status.get("process_start"))


def _start_of(process: int) -> int | None:
    """When a process of this machine started, in clock ticks since the machine did: ids come again, above all in a
    container that is started anew, and id and start together do not. None where the system does not say.

    Source: field 22 of /proc/PID/stat, proc_pid_stat(5).
    """
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])  # after the command's name, which may hold anything


@dataclass(frozen=True)
class Request:
    """A change of the running job's tasks."""

    path: Path
    attach: dict[str, Any] | None
    """A task, with the keys of a job spec's task."""
    remove: str | None
    """Name of a task."""

    def answer(self, error: str | None = None) -> None:
        """Say that the change was made, or why not."""
        write_json(self.path.with_suffix(".answer"), {"error": error})
        self.path.unlink(missing_ok=True)  # who asked may have given up


def requests(directory: Path) -> list[Request]:
    """What the job is asked and has not answered, oldest first."""
    found = []
    for path in (directory / REQUESTS).glob("*.json"):
        with contextlib.suppress(FileNotFoundError):  # who asked has given up
            found.append((path.stat().st_mtime, Request(path, **json.loads(path.read_text()))))
    return [request for _, request in sorted(found, key=lambda one: one[0])]


def ask(directory: Path, *, attach: Mapping[str, Any] | None = None, remove: str | None = None) -> None:
    """Ask a running job to add or to remove a task, and wait for its answer.

    Raises:
        RunError: the job does not run, or refuses; the message says why.
    """
    state = read_status(directory)["state"]
    if state != "running":
        raise RunError(
            f"The run in '{directory}' is {state}. Tasks are added to and removed from running jobs; "
            f"`multitask train --resume {directory}` goes on with one that stopped."
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
            raise RunError(f"The run in '{directory}' is {state} and did not take the change.")
    error = json.loads(answer.read_text())["error"]
    answer.unlink()
    if error:
        raise RunError(f"The run in '{directory}' goes on unchanged: {error}")
