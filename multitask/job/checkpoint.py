"""Checkpoints: one file with everything that a run needs to go on. It is written completely or not at all."""

import json
import logging
import re
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from multitask.data.storage import locate
from multitask.server.messages import is_finite
from multitask.server.progress import Progress

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
        """Write a checkpoint, remove the oldest ones beyond the number to keep, and return the path of the new one."""
        folder = locate(self._uri)
        folder.remove_partial()
        numbers = self._numbers()
        number = numbers[-1] + 1 if numbers else 0
        metadata = {"format": FORMAT, "progress": json.dumps(checkpoint.progress.to_json())}
        folder.write(_name(number), save(checkpoint.tensors, metadata))
        self._damaged.discard(number)
        for old in numbers[: len(numbers) + 1 - self._keep]:
            folder.delete(_name(old))
        return f"{self._uri}/{_name(number)}"

    def latest(self) -> Checkpoint | None:
        """Return the last checkpoint that is complete, or None if there is no checkpoint.

        A damaged checkpoint is skipped with a warning. Some filesystems show a file while it is written, so a driver
        that is killed can leave an incomplete one.

        Raises:
            CheckpointError: all checkpoints are damaged, or the last one has an unknown format.
        """
        self._damaged.clear()
        for number in reversed(self._numbers()):
            where = f"{self._uri}/{_name(number)}"
            content = locate(self._uri).read(_name(number))
            try:
                tensors = load(content)
                size = int.from_bytes(content[:8], "little")
                metadata = json.loads(content[8 : 8 + size])["__metadata__"]
            except (SafetensorError, ValueError, KeyError) as error:
                log.warning("%s: this checkpoint is not complete (%s). The one before it is tried.", where, error)
                self._damaged.add(number)
                continue
            if metadata["format"] != FORMAT:
                raise CheckpointError(
                    f"{where}: found format {metadata['format']}, expected {FORMAT}. Go on with the version of "
                    "multitask that wrote it."
                )
            return Checkpoint(Progress.from_json(json.loads(metadata["progress"])), tensors)
        if self._damaged:
            raise CheckpointError(
                f"{self._uri}: expected a complete checkpoint, found only damaged files "
                f"({', '.join(map(_name, sorted(self._damaged)))}). Restore one of them from a copy, or remove these "
                "files to go on from the start."
            )
        return None

    def clear(self) -> None:
        """Remove all checkpoints, for a run that starts from the beginning."""
        locate(self._uri).remove_partial()
        for number in self._numbers():
            locate(self._uri).delete(_name(number))

    def where(self) -> str | None:
        """Return the path of the last checkpoint that `latest` did not find damaged, or None."""
        numbers = self._numbers()
        return f"{self._uri}/{_name(numbers[-1])}" if numbers else None

    def _numbers(self) -> list[int]:
        matches = (_NAME.match(name) for name in locate(self._uri).names())
        return sorted({int(match[1]) for match in matches if match} - self._damaged)


def _name(number: int) -> str:
    return f"checkpoint-{number:06d}.safetensors"
