"""Checkpoints: one file with everything that a run needs to go on. It is written completely or not at all."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from multitask.data.storage import DataError, locate
from multitask.job.writing import keep_trying
from multitask.server.messages import is_finite
from multitask.server.progress import Progress
from patches.quoting import quoted, shortened

FORMAT = "1"
log = logging.getLogger(__name__)
_NAME = re.compile(r"^checkpoint-(\d{6,})\.safetensors$")


class CheckpointError(ValueError):
    """A run cannot go on from a checkpoint. The message says what was found and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run at one moment.

    Its tensors have names, so that a run with other groups or another number of shards can load it.
    """

    progress: Progress
    tensors: dict[str, Tensor]
    """`values/OWNER/NAME`, `slots/SLOT/OWNER/NAME` and `scalars/SCALAR/OWNER/NAME` (single numbers of an
    optimizer). OWNER is `backbone` or `tasks/TASK`."""

    def is_finite(self) -> bool:
        """Return whether all values are finite, so that training can go on from them."""
        return all(is_finite(tensor) for tensor in self.tensors.values())

    def shared_steps(self) -> dict[str, float]:
        """Return the steps that the optimizer has counted for each shared tensor, if it counts steps."""
        prefix = "scalars/step/backbone/"
        return {n.removeprefix(prefix): float(count) for n, count in self.tensors.items() if n.startswith(prefix)}


class _DamagedError(ValueError):
    """A file is not a complete checkpoint. The message says why."""


class CheckpointStore:
    """A folder of checkpoints, which are numbered in the order of writing. Only the last few are kept."""

    def __init__(self, uri: str, keep: int) -> None:
        """Args:
        uri: the folder: a path, or a URI of any filesystem that pyarrow supports.
        keep: number of checkpoints to keep.
        """
        self._uri, self._keep = uri, keep
        self._damaged: set[int] = set()
        """Numbers of damaged checkpoints that `latest` found. The next checkpoint that is saved replaces the first
        one."""

    def save(self, checkpoint: Checkpoint) -> str:
        """Write a checkpoint, remove the oldest ones beyond the number to keep, and return the path of the new one.

        Raises:
            TrainingError: the folder cannot be written, and was not mended within a minute.
        """
        progress = json.dumps(checkpoint.progress.to_json())
        metadata = {"format": FORMAT, "progress": progress, "sha256": _digest(progress, checkpoint.tensors)}
        content = save(checkpoint.tensors, metadata)
        return keep_trying(f"The checkpoint in '{self._uri}'", lambda: self._write(content))

    def _write(self, content: bytes) -> str:
        folder = locate(self._uri)
        folder.remove_partial()
        numbers = self._numbers()
        number = numbers[-1] + 1 if numbers else 0
        folder.write(_name(number), content)
        self._damaged.discard(number)
        for old in numbers[: len(numbers) + 1 - self._keep]:
            with suppress(FileNotFoundError):  # somebody has removed it
                folder.delete(_name(old))
        return f"{self._uri}/{_name(number)}"

    def latest(self) -> Checkpoint | None:
        """Return the last checkpoint that is complete, or None if there is no checkpoint.

        A damaged checkpoint is skipped with a warning. Some filesystems show a file while it is written, so a driver
        that is killed can leave an incomplete one.

        Raises:
            CheckpointError: all checkpoints are damaged, the last one has an unknown format, or the folder cannot be
                read.
        """
        self._damaged.clear()
        for number in reversed(self._listed()):
            where = f"{self._uri}/{_name(number)}"
            try:
                return _parsed(self._read(_name(number)), where)
            except _DamagedError as error:
                log.warning("%s: this checkpoint is damaged (%s). The one before it is tried.", where, error)
                self._damaged.add(number)
        if self._damaged:
            raise CheckpointError(
                f"{self._uri}: expected a complete checkpoint, found only damaged files "
                f"({', '.join(map(_name, sorted(self._damaged)[-5:]))}). Restore one of them from a copy, or remove "
                "these files to go on from the start."
            )
        return None

    def _read(self, name: str) -> bytes:
        folder = locate(self._uri)
        if folder.size(name) is None:  # reading a pipe would wait for ever
            raise _DamagedError("it is not a file")
        try:
            return folder.read(name)
        except (DataError, OSError) as error:
            raise _DamagedError(str(error)) from error

    def clear(self) -> None:
        """Remove all checkpoints, for a run that starts from the beginning."""
        locate(self._uri).remove_partial()
        for number in self._numbers():
            locate(self._uri).delete(_name(number))

    def where(self) -> str | None:
        """Return the path of the last checkpoint that `latest` did not find damaged, or None.

        Raises:
            CheckpointError: the folder cannot be read.
        """
        numbers = self._listed()
        return f"{self._uri}/{_name(numbers[-1])}" if numbers else None

    def _listed(self) -> list[int]:
        """Return `_numbers` for a reader.

        Raises:
            CheckpointError: the folder cannot be read.
        """
        try:
            return self._numbers()
        except OSError as error:
            raise CheckpointError(
                f"{self._uri}: expected a folder of checkpoints that can be read, found none ({error}). If something "
                "else is in its place, move that away and put the folder back."
            ) from error

    def _numbers(self) -> list[int]:
        """Return the numbers of the checkpoints that `latest` did not find damaged, in ascending order."""
        matches = (_NAME.match(name) for name in locate(self._uri).names())
        return sorted({int(match[1]) for match in matches if match} - self._damaged)


def _name(number: int) -> str:
    return f"checkpoint-{number:06d}.safetensors"


def _parsed(content: bytes, where: str) -> Checkpoint:
    """Return the checkpoint that a file holds.

    Raises:
        CheckpointError: the file has another format.
        _DamagedError: the file is not complete, or has changed since it was written.
    """
    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size])["__metadata__"]
        version, progress = metadata["format"], metadata["progress"]
        # Checkpoints of version 0.1 have no digest.
        whole = "sha256" not in metadata or metadata["sha256"] == _digest(progress, tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _DamagedError(quoted(error)) from error
    if version != FORMAT:
        raise CheckpointError(
            f"{where}: found format {quoted(version)}, expected {FORMAT}. Go on with the version of multitask that "
            "wrote it."
        )
    if not whole:
        raise _DamagedError("its content has changed since it was written")
    try:
        return Checkpoint(Progress.from_json(json.loads(progress)), tensors)
    except (ValueError, RecursionError) as error:
        raise _DamagedError(f"its progress cannot be read: {shortened(error)}") from error


def _digest(progress: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hexadecimal digits, of everything that a checkpoint holds."""
    digest = hashlib.sha256(progress.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
