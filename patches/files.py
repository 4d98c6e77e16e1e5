"""Write files atomically: a reader finds either the old file or the complete new one. Read only regular files."""

import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

LEFT_BEHIND_S = 3600.0
"""Age in seconds from which a temporary file counts as left behind by a killed process."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers that say that a file does not fit: the disk or a quota is full, or files may not be that large."""


class DiskFullError(OSError):
    """A file does not fit on its disk. The message names the file, and says what it needs and what is free."""


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` atomically. See `atomic_file`."""
    with atomic_file(path, len(data)) as file:
        file.write(data)


@contextmanager
def atomic_file(path: str | os.PathLike[str], size_bytes: int = 0) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`. At the end of the block it is flushed to disk and renamed to `path`.

    Missing parent folders are made. If anything fails, the temporary file is removed and an older file at `path` stays
    as it was.

    Args:
        size_bytes: what is known of the file's size, for the message of `DiskFullError`.
    Raises:
        DiskFullError: the disk is full.
        OSError: the folder cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")

    def needed_bytes() -> int:
        return max(size_bytes, temporary.stat().st_size if temporary.exists() else 0)

    try:
        with naming_full_disk(target, needed_bytes):
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
    finally:
        with suppress(OSError):  # it is renamed or was never made
            temporary.unlink()
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the rename survives a power cut too
    finally:
        os.close(folder)


@contextmanager
def naming_full_disk(path: str | os.PathLike[str], needed_bytes: Callable[[], int]) -> Iterator[None]:
    """Turn the error of a full disk inside the block, in which a file is written, into one that names the file.

    Args:
        path: the file.
        needed_bytes: called when the disk is full; returns how many bytes the file needs at least.
    Raises:
        DiskFullError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = _free_bytes(os.fspath(path))
        room = "" if free is None else f", and {free:,} are free"
        raise DiskFullError(
            f"'{path}' needs at least {needed_bytes():,} bytes{room}: {os.strerror(error.errno)}. Make room, and start "
            "again. Nothing half-written was left behind."
        ) from error


def _free_bytes(path: str) -> int | None:
    """Return the free bytes on the disk of a path that may not exist yet; None for a path that is a URI."""
    if "://" in path:
        return None
    return shutil.disk_usage(existing_folder(Path(path))).free


def existing_folder(path: Path) -> Path:
    """Return the folder `path`, or the nearest folder above it if there is none."""
    whole = path.absolute()
    return next(folder for folder in (whole, *whole.parents) if folder.is_dir())


def read_regular(path: Path, most_bytes: int | None = None) -> bytes:
    """Read a file that others may have put in its place, without waiting for ever and without following a link.

    Args:
        most_bytes: largest size that is read; None for any size.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a link, a folder, a pipe or a device, or larger than `most_bytes`.
        OSError: it cannot be read.
    """
    # To open a pipe would wait for a process that writes to it, and a link may lead to an endless device.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise ValueError("it is a link or a socket, not a regular file") from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(-1 if most_bytes is None else most_bytes + 1)
    finally:
        os.close(descriptor)
    if most_bytes is not None and len(content) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes:,} bytes")
    return content


def remove_left_behind(folder: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote to `folder`."""
    for temporary in folder.glob(".*.tmp"):
        with suppress(OSError):  # another process has removed it already, or it belongs to another user
            if time.time() - temporary.stat().st_mtime > LEFT_BEHIND_S:
                temporary.unlink()
