"""Write files atomically: a reader finds either the old file or the complete new one."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

LEFT_BEHIND_S = 3600.0
"""Age in seconds from which a temporary file counts as left behind by a killed process."""


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` atomically. See `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`. At the end of the block it is flushed to disk and renamed to `path`.

    Missing parent folders are made. If anything fails, the temporary file is removed and an older file at `path` stays
    as it was.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the rename survives a power cut too
    finally:
        os.close(folder)


def remove_left_behind(folder: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote to `folder`."""
    for temporary in folder.glob(".*.tmp"):
        with suppress(OSError):  # another process has removed it already, or it belongs to another user
            if time.time() - temporary.stat().st_mtime > LEFT_BEHIND_S:
                temporary.unlink()
