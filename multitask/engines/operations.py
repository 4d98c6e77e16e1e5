"""Engine `allreduce`: the operations that the ledger writes down and the ranks carry out."""

from collections.abc import Iterable
from dataclasses import dataclass

from multitask.server.messages import Gradients, Key
from multitask.server.shard import Shard, Update


@dataclass(frozen=True)
class Apply:
    """Apply a round's update; it is empty if all pushes of the round were rejected."""

    update: Update


@dataclass(frozen=True)
class TakeSnapshot:
    """Keep a copy of the present values."""

    version: int
    slots: bool
    """Keep the optimiser's slots too."""


@dataclass(frozen=True)
class DropSnapshot:
    """Forget a snapshot."""

    version: int


Operation = Apply | TakeSnapshot | DropSnapshot


class Ledger(Shard):
    """A shard without values: it writes down the operations that the ranks carry out on the values that they hold."""

    def __init__(self, workers: Iterable[str]) -> None:
        super().__init__({})
        self._unread: dict[str, list[Operation]] = {worker: [] for worker in workers}

    def read(self, worker: str) -> list[Operation]:
        """Return the operations that this worker has not read yet, and count them as read."""
        unread, self._unread[worker] = self._unread[worker], []
        return unread

    def has_unread(self, worker: str) -> bool:
        return bool(self._unread[worker])

    def rounds_behind(self, worker: str) -> int:
        """Return the number of ended rounds that this worker has not read of."""
        return sum(isinstance(operation, Apply) for operation in self._unread[worker])

    def stash(self, key: Key, gradients: Gradients, names: Iterable[str]) -> str | None:  # noqa: ARG002
        return None

    def apply(self, update: Update, done: Iterable[Key]) -> None:  # noqa: ARG002
        self._write(Apply(update))

    def take_snapshot(self, version: int, slots: bool) -> None:
        self._write(TakeSnapshot(version, slots))

    def drop_snapshot(self, version: int) -> None:
        self._write(DropSnapshot(version))

    def _write(self, operation: Operation) -> None:
        for unread in self._unread.values():
            unread.append(operation)
