"""Writing a file so that a reader finds the old one or the whole new one, never a part."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

LEFT_BEHIND_S = 3600.0
"""Nobody writes any more to a temporary file that is as old."""


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A temporary file beside `path` to write to; at the end of the block it is flushed to disk and renamed into place.

    Missing parent folders are made. When anything fails, what was at `path` before is still there and the temporary
    file is gone.

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
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def remove_left_behind(folder: Path) -> None:
    """Take away the temporary files of processes that were killed while they wrote to `folder`."""
    for temporary in folder.glob(".*.tmp"):
        with suppress(OSError):  # another process takes it away too, or it is another user's
            if time.time() - temporary.stat().st_mtime > LEFT_BEHIND_S:
                temporary.unlink()
