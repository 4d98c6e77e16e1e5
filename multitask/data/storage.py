"""Directories on any pyarrow filesystem: where tables are read from and written to."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs

BLOCK_BYTES = 1 << 22
PARTIAL = ".partial"


class DataError(ValueError):
    """A table or an image in it cannot be used: the message says what was expected, what was found, what to do."""


@dataclass(frozen=True)
class Location:
    """A directory; picklable, so that other processes read the same one."""

    filesystem: pa.fs.FileSystem
    root: str
    where: str
    """How messages name it: a local path, or the URI as it was given."""

    def join(self, name: str) -> "Location":
        return Location(self.filesystem, f"{self.root}/{name}", f"{self.where}/{name}")

    def exists(self) -> bool:
        return self.filesystem.get_file_info(self.root).type != pa.fs.FileType.NotFound

    def names(self) -> list[str]:
        """Files and folders in the directory; none where it does not exist."""
        selector = pa.fs.FileSelector(self.root, allow_not_found=True)
        return [info.base_name for info in self.filesystem.get_file_info(selector)]

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        info = self.filesystem.get_file_info(f"{self.root}/{name}")
        return info.size if info.type == pa.fs.FileType.File else None

    def open(self, name: str) -> pa.NativeFile:
        """A file to read anywhere in it.

        Raises:
            DataError: there is no such file, or it cannot be read.
        """
        try:
            return self.filesystem.open_input_file(f"{self.root}/{name}")
        except FileNotFoundError as error:
            raise DataError(
                f"{self.where}/{name}: found no such file, expected a part of an image table. Copy the table again "
                "from where it came from, or write it anew."
            ) from error
        except OSError as error:
            raise DataError(
                f"{self.where}/{name}: cannot be read ({error}). Check the location and the rights to read it."
            ) from error

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def sha256(self, name: str) -> str:
        """Hash of a file, read in blocks."""
        digest = hashlib.sha256()
        with self.open(name) as file:
            while block := file.read_buffer(BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def write(self, name: str, content: bytes) -> None:
        with self.writing(name) as sink:
            sink.write(content)

    def write_json(self, name: str, content: Any) -> None:
        self.write(name, (json.dumps(content, indent=2) + "\n").encode())

    @contextmanager
    def writing(self, name: str) -> Iterator["Sink"]:
        """A new file that appears whole when the block ends, or not at all.

        On a local disk it is written beside its place, synchronised and renamed; object stores show an upload when it
        is complete.
        """
        self.filesystem.create_dir(self.root, recursive=True)
        target = f"{self.root}/{name}"
        local = isinstance(self.filesystem, pa.fs.LocalFileSystem)
        path = f"{self.root}/.{name}.{secrets.token_hex(4)}{PARTIAL}" if local else target
        stream = self.filesystem.open_output_stream(path)
        try:
            yield Sink(stream)
            stream.close()
            if local:
                _synchronise(path)
                os.replace(path, target)
                _synchronise(self.root)
        except BaseException:
            # Arrow completes an upload whenever its stream goes: the object is taken away again.
            stream.close()
            self.filesystem.delete_file(path)
            raise

    def remove_partial(self) -> None:
        """Take away files that a killed process left half-written."""
        for name in self.names():
            if name.endswith(PARTIAL):
                self.filesystem.delete_file(f"{self.root}/{name}")

    def delete(self, name: str) -> None:
        """One file."""
        self.filesystem.delete_file(f"{self.root}/{name}")

    def remove(self) -> None:
        """The directory and everything in it."""
        self.filesystem.delete_dir(self.root)


class Sink:
    """A stream that counts and hashes what goes through it; a file object for pyarrow."""

    closed = False

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self.bytes = 0

    def write(self, content: Any) -> int:
        self._stream.write(content)
        self._digest.update(content)
        self.bytes += len(content)
        return len(content)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        pass

    def close(self) -> None:
        """The block of `Location.writing` closes the stream."""

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def locate(uri: str | os.PathLike[str]) -> Location:
    """The directory at a local path or at the URI of any pyarrow filesystem (file://, s3://, gs://, ...).

    Raises:
        DataError: no filesystem knows the URI, or the store that it names does not answer.
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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
