"""What the ranks of a group do together: agree on values, and sum tensors."""

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

WAIT = timedelta(days=1)
"""Timeout of a collective. Other ranks may be evaluating for long; lost and silent ranks are found by other means."""


class PeerLostError(RuntimeError):
    """A collective failed, most likely because another process of its group is gone."""


class Sum(Protocol):
    """A sum that has been started."""

    def wait(self) -> None:
        """Wait until the sum has been made.

        Raises:
            PeerLostError: another process of the group is gone.
        """


class Members(Protocol):
    """Some of the ranks, which sum tensors among themselves."""

    def start_sum(self, tensor: Tensor) -> Sum:
        """Start to replace a tensor by its sum over the members. All members start the same sums in the same order.

        Raises:
            PeerLostError: another process of the group is gone.
        """


class Collectives(Protocol):
    """What one rank does together with all others. Every rank makes the same calls in the same order.

    Every method raises PeerLostError if another process of the group is gone.
    """

    @property
    def rank(self) -> int: ...

    @property
    def sums_on(self) -> torch.device | None:
        """Device that holds tensors while they are summed; None for the device of the model."""

    def broadcast(self, value: Any) -> Any:
        """Return the value that rank 0 gives."""

    def gather(self, value: Any) -> list[Any]:
        """Return the values that all ranks give, in the order of the ranks."""

    def members(self, ranks: Sequence[int]) -> Members:
        """Return the members of a smaller group. Every rank makes all groups, whether it belongs to them or not."""


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """Turn errors of torch.distributed in the block into PeerLostError."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(f"A collective failed: {error}") from error


class TorchSum:
    """A sum that torch.distributed has started."""

    def __init__(self, work: dist.Work) -> None:
        self._work = work

    def wait(self) -> None:
        with peers():
            self._work.wait()


class TorchMembers:
    """Members of a process group of torch.distributed."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def start_sum(self, tensor: Tensor) -> TorchSum:
        with peers():
            work = dist.all_reduce(tensor, group=self._group, async_op=True)
        assert work is not None, "this process is a member of the group"
        return TorchSum(work)


class TorchCollectives:
    """Collectives of torch.distributed, which Ray Train has set up in this process."""

    def __init__(self) -> None:
        self._control = _new_group(backend="gloo")
        """All ranks, for values on the CPU."""
        self.rank = dist.get_rank()
        self.sums_on = None if dist.get_backend() == "nccl" else torch.device("cpu")

    def broadcast(self, value: Any) -> Any:
        message = [value]
        with peers():
            dist.broadcast_object_list(message, src=0, group=self._control)
        return message[0]

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        with peers():
            dist.all_gather_object(values, value, group=self._control)
        return values

    def members(self, ranks: Sequence[int]) -> TorchMembers:
        return TorchMembers(_new_group(ranks))


def _new_group(ranks: Sequence[int] | None = None, backend: str | None = None) -> dist.ProcessGroup:
    with peers():
        group = dist.new_group(ranks, timeout=WAIT, backend=backend)
    return cast(dist.ProcessGroup, group)  # A rank outside the group gets a marker instead, and does not use it.
