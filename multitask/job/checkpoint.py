"""Checkpoints: everything that a run needs to go on, in one file that is written whole or not at all."""

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
    """A checkpoint that cannot be gone on from; the message says what was found and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """One moment of a run. Tensors have names, so another division into groups or shards can take them up."""

    progress: Progress
    tensors: dict[str, Tensor]
    """`values/OWNER/NAME`, `slots/SLOT/OWNER/NAME` and `scalars/SCALAR/OWNER/NAME` (an optimiser's single numbers);
    OWNER is `backbone` or `tasks/TASK`."""

    def is_finite(self) -> bool:
        """Training can go on from these values."""
        return all(is_finite(tensor) for tensor in self.tensors.values())

    def shared_steps(self) -> dict[str, float]:
        """Name of a shared tensor -> steps that its optimiser has counted, where it counts."""
        prefix = "scalars/step/backbone/"
        return {n.removeprefix(prefix): float(count) for n, count in self.tensors.items() if n.startswith(prefix)}


class CheckpointStore:
    """A folder of checkpoints, numbered in the order of writing; the last few are kept."""

    def __init__(self, uri: str, keep: int) -> None:
        """Args:
        uri: a path, or a URI of any filesystem that pyarrow reaches.
        keep: how many to keep.
        """
        self._uri, self._keep = uri, keep
        self._damaged: set[int] = set()
        """Numbers that `latest` has passed over; the next checkpoint that is saved overwrites the first of them."""

    def save(self, checkpoint: Checkpoint) -> str:
        """Write a checkpoint, then remove those that are too old; returns where it lies."""
        folder = locate(self._uri)
        folder.remove_partial()
        numbers = self._numbers()
        number = numbers[-1] + 1 if numbers else 0
        metadata = {"format": FORMAT, "progress": json.dumps(checkpoint.progress.to_json())}
        folder.write(_name(number), save(checkpoint.tensors, metadata))
        self._damaged.discard(number)
        for number in numbers[: len(numbers) + 1 - self._keep]:
            folder.delete(_name(number))
        return f"{self._uri}/{_name(number)}"

    def latest(self) -> Checkpoint | None:
        """The whole checkpoint written last; None where there is no checkpoint.

        One that is damaged is passed over with a warning: where a filesystem shows files while they are written, a
        killed driver leaves a part of its last one.

        Raises:
            CheckpointError: all of them are damaged, or it is of a newer format.
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
                log.warning("%s: found no whole checkpoint (%s). Looking for the one before it.", where, error)
                self._damaged.add(number)
                continue
            if metadata["format"] != FORMAT:
                raise CheckpointError(
                    f"{where}: found format {metadata['format']}, expected {FORMAT}. Go on with the version that wrote "
                    "it."
                )
            return Checkpoint(Progress.from_json(json.loads(metadata["progress"])), tensors)
        if self._damaged:
            raise CheckpointError(
                f"{self._uri}: found no whole checkpoint, only damaged files "
                f"({', '.join(map(_name, sorted(self._damaged)))}). Put a whole one back, or remove these files to go "
                "on from the start."
            )
        return None

    def clear(self) -> None:
        """Remove all checkpoints, for a run that begins anew."""
        locate(self._uri).remove_partial()
        for number in self._numbers():
            locate(self._uri).delete(_name(number))

    def where(self) -> str | None:
        """Where the latest checkpoint lies, of those not found damaged."""
        numbers = self._numbers()
        return f"{self._uri}/{_name(numbers[-1])}" if numbers else None

    def _numbers(self) -> list[int]:
        matches = (_NAME.match(name) for name in locate(self._uri).names())
        return sorted({int(match[1]) for match in matches if match} - self._damaged)


def _name(number: int) -> str:
    return f"checkpoint-{number:06d}.safetensors"
