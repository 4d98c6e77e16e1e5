"""What the simulated ranks of a group do together: values, and sums of tensors."""

from collections.abc import Sequence
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multitask.cluster.collectives import PeerLostError
from tests.simulation.messages import copied, share
from tests.simulation.refs import Waiter
from tests.simulation.world import Process

if TYPE_CHECKING:
    from tests.simulation.cluster import SimulatedCluster


class Operation:
    """Something that ranks do together."""

    def __init__(self, needed: Sequence[int]) -> None:
        self.needed = needed
        """Ranks without which it cannot be done."""
        self.given: dict[int, Any] = {}
        """Rank -> what it has given."""
        self.ended: set[int] = set()
        """Ranks that know the result."""
        self.broken: set[int] = set()
        """Ranks that will never know the result."""
        self.waiter: dict[int, Waiter] = {}
        """Rank -> its thread, which waits."""
        self._total: Tensor | None = None

    def is_given(self) -> bool:
        return all(rank in self.given for rank in self.needed)

    def total(self) -> Tensor:
        """Return the sum of what all ranks have given, in their order."""
        if self._total is None:
            first, *others = (self.given[rank] for rank in self.needed)
            self._total = first.clone()
            for tensor in others:
                self._total += tensor
        return self._total


class RankGroup:
    """The ranks of one start of a group."""

    def __init__(self, cluster: "SimulatedCluster", size: int) -> None:
        self._cluster, self._world = cluster, cluster.world
        self.size = size
        self._processes: dict[int, Process] = {}
        self._lost: set[int] = set()
        self._fails_at: dict[int, float] = {}
        """Rank -> the time from which its operations with a lost rank fail; infinite if they hang."""
        self._operations: dict[tuple[Any, ...], Operation] = {}

    def join(self, rank: int, process: Process) -> None:
        """Note the process of a rank."""
        process.rank = self, rank
        self._processes[rank] = process
        process.at_death.append(partial(self._lose, rank))

    def give(self, rank: int, key: tuple[Any, ...], needed: Sequence[int], value: Any) -> Operation:
        """Take part in an operation.

        Args:
            key: names the operation; all ranks give the same.
        """
        self._world.here()
        if key not in self._operations:
            self._operations[key] = Operation(needed)
        operation = self._operations[key]
        was_given = operation.is_given()
        operation.given[rank] = value
        if was_given:
            self._end_later(operation, rank)
        elif operation.is_given():
            for other in operation.given:
                self._end_later(operation, other)
        return operation

    def wait(self, rank: int, operation: Operation, what: str) -> None:
        """Wait until the result of an operation is known to a rank.

        Raises:
            PeerLostError: another rank is lost.
        """
        world = self._world
        world.here()
        while rank not in operation.ended:
            if self._fails(rank, operation):
                raise PeerLostError("A collective failed: another rank is gone.")
            operation.waiter[rank] = Waiter(world, world.thread(), 1)
            world.block(what, "with ranks", [other for other in operation.needed if other not in operation.given])

    def _fails(self, rank: int, operation: Operation) -> bool:
        concerned = rank in operation.broken or (not operation.is_given() and self._lost.intersection(operation.needed))
        return bool(concerned) and self._world.now >= self._fails_at.get(rank, inf)

    def _end_later(self, operation: Operation, rank: int) -> None:
        node = self._processes[rank].node
        self._world.later(node.delay_from(node), self._end, operation, rank)

    def _end(self, operation: Operation, rank: int) -> None:
        if rank not in operation.broken:
            operation.ended.add(rank)
            self._wake(operation, rank)

    @staticmethod
    def _wake(operation: Operation, rank: int) -> None:
        waiter = operation.waiter.pop(rank, None)
        if waiter is not None:
            waiter.arrive()

    def _lose(self, rank: int) -> None:
        """Decide how the others notice that a rank is lost: by an error, or not at all."""
        self._lost.add(rank)
        chance = self._world.random.random
        for other, process in self._processes.items():
            if process.alive and other not in self._fails_at:
                delay_s = self._cluster.timing.detect_s * chance() if chance() < 0.5 else inf
                self._fails_at[other] = self._world.now + delay_s
                if delay_s < inf:
                    self._world.later(delay_s, self._wake_all, other)
        for operation in self._operations.values():
            for other in operation.given:
                if rank in operation.needed and other not in operation.ended and chance() < 0.5:
                    operation.broken.add(other)

    def _wake_all(self, rank: int) -> None:
        for operation in self._operations.values():
            self._wake(operation, rank)


class SimulatedCollectives:
    """`multitask.cluster.collectives.Collectives` of one rank."""

    sums_on = torch.device("cpu")

    def __init__(self, group: RankGroup, rank: int) -> None:
        self._group, self.rank = group, rank
        self._everyone = tuple(range(group.size))
        self._values = 0
        self._groups = 0

    def broadcast(self, value: Any) -> Any:
        operation = self._together((0,), value if self.rank == 0 else None)
        return copied(operation.given[0])

    def gather(self, value: Any) -> list[Any]:
        operation = self._together(self._everyone, value)
        return [copied(operation.given[rank]) for rank in self._everyone]

    def members(self, ranks: Sequence[int]) -> "SimulatedMembers":
        self._groups += 1
        return SimulatedMembers(self._group, self.rank, tuple(ranks), self._groups)

    def _together(self, needed: Sequence[int], value: Any) -> Operation:
        self._values += 1
        operation = self._group.give(self.rank, ("value", self._values), needed, copied(value))
        self._group.wait(self.rank, operation, "a value")
        return operation


class SimulatedMembers:
    """Some of the ranks, as one of them sees them."""

    def __init__(self, group: RankGroup, rank: int, ranks: Sequence[int], number: int) -> None:
        self._group, self._rank, self._ranks, self._number = group, rank, ranks, number
        self._sums = 0

    def start_sum(self, tensor: Tensor) -> "SimulatedSum":
        assert self._rank in self._ranks, f"rank {self._rank} is not among {self._ranks}"
        self._sums += 1
        key = "sum", self._number, self._sums
        operation = self._group.give(self._rank, key, self._ranks, tensor.detach().clone())
        return SimulatedSum(self._group, self._rank, operation, tensor)


class SimulatedSum:
    """A sum that has been started."""

    def __init__(self, group: RankGroup, rank: int, operation: Operation, tensor: Tensor) -> None:
        self._group, self._rank, self._operation, self._tensor = group, rank, operation, tensor

    def wait(self) -> None:
        self._group.wait(self._rank, self._operation, "a sum")
        self._tensor.copy_(self._operation.total())


share(RankGroup)
