"""Claiming a run directory: of all processes that want to train in it, one does."""

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import IO, Any

from multitask.run.directory import RunError
from multitask.run.live import STATUS, read_status
from multitask.spec.errors import SpecError

LOCK = ".claim"
"""File in the run directory that is locked while a process looks at the directory and claims it."""
FIRST = ("tasks.json", "spec.yaml", STATUS)
"""The first files of a run, in the order in which they are written. They are removed in the opposite order."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def claiming(directory: Path) -> Iterator[None]:
    """Let one process at a time look at a run directory and write its status file, which claims the directory.

    The directory is created if it is missing. The lock is free again at the end of the block, or of the process.
    """
    path = directory / LOCK
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                log.warning(
                    "'%s' is on a file system without locks (%s). Start no second process for this run.",
                    directory,
                    error,
                )
            # Whoever had the lock before has removed the file, and perhaps somebody else has made a new one.
            if _is_at(file, path):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


def _is_at(file: IO[str], path: Path) -> bool:
    """Return whether an open file still has this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def check_new(directory: Path, overwrite: bool) -> None:
    """Check that a new run may be written to this directory.

    Raises:
        SpecError: the directory has a run that is running, or one that only `overwrite` replaces, or files that belong
            to no run.
    """
    if not directory.exists() or not (names := {path.name for path in directory.iterdir() if not _is_passing(path)}):
        return
    # A spec.yaml alone may be a user's own, in a folder with other things of that user.
    if names != {"tasks.json"} and not ("spec.yaml" in names and names & {"tasks.json", STATUS, "result.json"}):
        raise SpecError(
            f"Run directory '{directory}' holds other files and no run. Name another directory with `directory`."
        )
    status = read_status(directory) if STATUS in names else None
    if status is not None and status["state"] == "running":
        raise SpecError(
            f"Run directory '{directory}' holds a run that {_runs_where(status)}. Stop that process first (Ctrl-C), or "
            "name another directory with `directory`."
        )
    if not overwrite and names - {"tasks.json", "spec.yaml"}:  # these two alone are of a process killed at its start
        ended = "result.json" in names
        go_on = "" if ended else f" go on with it (multitask resume {quote(str(directory))}),"
        raise SpecError(
            f"Run directory '{directory}' holds a run. Name another one with `directory`,{go_on} or replace it "
            "(--overwrite; in Python overwrite=True)."
        )


def _is_passing(path: Path) -> bool:
    """Return whether a file is the lock, or one that `write_atomic` had not finished when its process was killed."""
    return path.name == LOCK or (path.name.startswith(".") and path.name.endswith(".tmp"))


def check_stopped(directory: Path) -> dict[str, Any] | None:
    """Check that a run may go on.

    Returns:
        Content of the status file; None if the driver was lost before it wrote one.
    Raises:
        RunError: there is no run, or it has ended, or it is running.
    """
    if not (directory / "spec.yaml").is_file():
        raise RunError(f"'{directory}' holds no run (no spec.yaml). Name a directory that `multitask train` uses.")
    if (directory / "result.json").is_file():
        raise RunError(f"The run in '{directory}' has ended; there is nothing left to train. Next: multitask export.")
    status = read_status(directory) if (directory / STATUS).is_file() else None
    if status is not None and status["state"] == "running":
        raise RunError(f"The run in '{directory}' {_runs_where(status)}. Stop that process first (Ctrl-C).")
    return status


def empty(directory: Path) -> None:
    """Remove an earlier run from a claimed directory, its first files last: until then, what is left is still a run."""
    order = {name: -number for number, name in enumerate(FIRST)}
    for path in sorted(directory.iterdir(), key=lambda path: order.get(path.name, -len(FIRST))):
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _runs_where(status: Mapping[str, Any]) -> str:
    return f"is running, in process {status['process']} on '{status['host']}'"
