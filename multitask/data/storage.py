"""Directories on any pyarrow filesystem, from which tables are read and to which they are written."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs

from patches.files import naming_full_disk

BLOCK_BYTES = 1 << 22
"""Bytes that are read at once while a file is hashed."""
PARTIAL = ".partial"
"""Ending of a file that is still being written."""
REMAKE = "Copy the table again from where it came from, or write it anew."
"""The advice of every error about a damaged table."""


class DataError(ValueError):
    """A table or an image cannot be used. The message says what was expected, what was found and what to do."""


@dataclass(frozen=True)
class Location:
    """A directory on a filesystem. It can be pickled, so that other processes use the same directory."""

    filesystem: pa.fs.FileSystem
    root: str
    where: str
    """Name of the directory in messages: a local path, or the URI that the user gave."""

    def join(self, name: str) -> "Location":
        """Return the directory `name` inside this directory."""
        return Location(self.filesystem, f"{self.root}/{name}", f"{self.where}/{name}")

    def exists(self) -> bool:
        """Return whether anything exists at this location."""
        return self.filesystem.get_file_info(self.root).type != pa.fs.FileType.NotFound

    def names(self) -> list[str]:
        """Return the names of all files and folders in the directory. The list is empty if there is no directory."""
        selector = pa.fs.FileSelector(self.root, allow_not_found=True)
        return [info.base_name for info in self.filesystem.get_file_info(selector)]

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, or None if there is no such file."""
        info = self.filesystem.get_file_info(f"{self.root}/{name}")
        return info.size if info.type == pa.fs.FileType.File else None

    def open(self, name: str) -> pa.NativeFile:
        """Open a file for reading at any offset.

        Raises:
            DataError: the file does not exist or cannot be read.
        """
        try:
            return self.filesystem.open_input_file(f"{self.root}/{name}")
        except FileNotFoundError as error:
            raise DataError(
                f"{self.where}/{name}: found no such file, expected a part of an image table. {REMAKE}"
            ) from error
        except OSError as error:
            raise DataError(
                f"{self.where}/{name}: cannot be read ({error}). Check the location and your permission to read it."
            ) from error

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        with self.open(name) as file:
            return file.read()

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a file as hexadecimal digits. The file is read block by block."""
        digest = hashlib.sha256()
        with self.open(name) as file:
            while block := file.read_buffer(BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def write(self, name: str, content: bytes) -> None:
        """Write a file as `writing` does."""
        with self.writing(name) as sink:
            sink.write(content)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file as `writing` does."""
        self.write(name, (json.dumps(content, indent=2) + "\n").encode())

    @contextmanager
    def writing(self, name: str) -> Iterator["Sink"]:
        """Write a new file that appears complete when the `with` block ends. If the block fails, no file appears.

        On a local disk, the content goes to a temporary file in the same directory, which is synchronised and then
        renamed. An object store shows an upload only when it is complete.

        Raises:
            DiskFullError: the disk is full.
            OSError: the directory cannot be written.
        """
        self.filesystem.create_dir(self.root, recursive=True)
        target = f"{self.root}/{name}"
        local = isinstance(self.filesystem, pa.fs.LocalFileSystem)
        path = f"{self.root}/.{name}.{secrets.token_hex(4)}{PARTIAL}" if local else target
        stream = self.filesystem.open_output_stream(path)
        sink = Sink(stream)
        with naming_full_disk(f"{self.where}/{name}", lambda: sink.bytes):
            try:
                yield sink
                stream.close()
                if local:
                    _synchronise(path)
                    os.replace(path, target)
                    _synchronise(self.root)
            except BaseException:
                # Closing an Arrow stream always completes the upload, so the incomplete object has to be deleted. On a
                # full disk the closing may fail again, and a folder that was removed has nothing to delete.
                with suppress(OSError):
                    stream.close()
                with suppress(OSError):
                    self.filesystem.delete_file(path)
                raise

    def remove_partial(self) -> None:
        """Delete the incomplete files that a killed process left behind."""
        for name in self.names():
            if name.endswith(PARTIAL):
                with suppress(FileNotFoundError):  # another process has removed it
                    self.filesystem.delete_file(f"{self.root}/{name}")

    def delete(self, name: str) -> None:
        """Delete one file."""
        self.filesystem.delete_file(f"{self.root}/{name}")

    def remove(self) -> None:
        """Delete the directory and everything in it."""
        self.filesystem.delete_dir(self.root)


class Sink:
    """A file object for pyarrow that counts and hashes the bytes written to it."""

    closed = False

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self.bytes = 0
        """Number of bytes that were given to be written so far."""

    def write(self, content: Any) -> int:
        self.bytes += len(content)
        self._stream.write(content)
        self._digest.update(content)
        return len(content)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        pass

    def close(self) -> None:
        """Do nothing: `Location.writing` closes the stream at the end of its block."""

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def locate(uri: str | os.PathLike[str]) -> Location:
    """Return the directory at a local path or at the URI of any pyarrow filesystem (file://, s3://, gs://, ...).

    Raises:
        DataError: pyarrow has no filesystem for the URI, or the store behind it does not answer.
    """
    text = os.fspath(uri)
    if "://" not in text:
        filesystem, root = pa.fs.LocalFileSystem(), os.path.abspath(text)
    else:
        try:
            filesystem, root = pa.fs.FileSystem.from_uri(text)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"{text}: found a location that cannot be read ({error}), expected a local path or a URI such as "
                "file:///data/train or s3://bucket/train. Correct the table's location."
            ) from error
    root = root.rstrip("/")
    return Location(filesystem, root, root if isinstance(filesystem, pa.fs.LocalFileSystem) else text.rstrip("/"))


def _synchronise(path: str) -> None:
    """Force the operating system to write a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
