"""Claiming a run directory: of all processes that want to train in it, one does."""

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from multitask.run.directory import RunError
from multitask.run.live import STATUS, read_status
from multitask.spec.errors import SpecError

LOCK = ".claim"
"""File in the run directory that is locked while a process looks at the directory and claims it."""

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
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


def check_new(directory: Path, overwrite: bool) -> None:
    """Check that a new run may be written to this directory.

    Raises:
        SpecError: the directory has a run that is running, or one that only `overwrite` replaces, or files that belong
            to no run.
    """
    if not directory.exists() or not (names := {path.name for path in directory.iterdir()} - {LOCK}):
        return
    if "spec.yaml" not in names:
        raise SpecError(
            f"Run directory '{directory}' holds other files and no run. Name another directory with `directory`."
        )
    status = read_status(directory) if STATUS in names else None
    if status is not None and status["state"] == "running":
        raise SpecError(
            f"Run directory '{directory}' holds a run that {_runs_where(status)}. Stop that process first (Ctrl-C), or "
            "name another directory with `directory`."
        )
    ended = "result.json" in names
    if not overwrite and (ended or status is not None):
        go_on = "" if ended else f" go on with it (multitask train --resume {quote(str(directory))}),"
        raise SpecError(
            f"Run directory '{directory}' holds a run. Name another one with `directory`,{go_on} or use --overwrite."
        )


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
    """Remove an earlier run from a claimed directory, its spec last: until then, what is left is still a run."""
    for path in sorted(directory.iterdir(), key=lambda path: path.name == "spec.yaml"):
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _runs_where(status: Mapping[str, Any]) -> str:
    return f"is running, in process {status['process']} on '{status['host']}'"
