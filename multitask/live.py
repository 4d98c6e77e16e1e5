"""What a running job shows, and what it is asked: files in its run directory, read and written by other processes."""

import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multitask.runs import RunError, write_json

STATUS = "status.json"
REQUESTS = "requests"
WRITE_EVERY_S = 1.0
SILENT_S = 60.0
"""A driver on another machine that has not written for so long is taken for dead."""
POLL_S = 0.2


class LiveStatus:
    """Written by the driver of a run: state, progress of each task, faults, the latest checkpoint."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / STATUS
        self._written = -WRITE_EVERY_S

    def write(self, content: Mapping[str, Any], *, now: bool = False) -> None:
        """Replace the file, at most once a second unless `now`."""
        if now or time.monotonic() - self._written >= WRITE_EVERY_S:
            where = {"process": os.getpid(), "host": socket.gethostname(), "updated": time.time()}
            write_json(self._path, {**content, **where})
            self._written = time.monotonic()


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

    A state that only a living driver has ("running") becomes "lost" where its process is gone, or, on another machine,
    was not heard of for a minute.
    """
    judged = {**status, "silent_s": max(0.0, time.time() - status["updated"])}
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
    return True


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
        self.path.unlink()


def requests(directory: Path) -> list[Request]:
    """What the job is asked and has not answered, oldest first."""
    paths = sorted((directory / REQUESTS).glob("*.json"), key=lambda path: path.stat().st_mtime)
    return [Request(path, **json.loads(path.read_text())) for path in paths]


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
