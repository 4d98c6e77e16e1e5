"""Gradients that meet by all_reduce, in buckets, while the backward pass is still running.

Knows torch.distributed and flat buffers; nothing of Ray, tasks or rounds.
Source: Li et al., "PyTorch Distributed", VLDB 2020, arXiv:2006.15704: buckets in a fixed order, started by hooks.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from multitask.server.layout import Layout, Role

NEUTRAL = -0.0
"""Adding it changes no bit of any float; adding +0.0 would turn -0.0 into +0.0."""
FLOAT_BYTES = 4


class PeerLostError(RuntimeError):
    """A collective failed, most likely because another process of its group is gone."""


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """What torch.distributed raises in the block becomes a PeerLostError."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(f"A collective failed: {error}") from error


@dataclass(frozen=True)
class Bucket:
    """A contiguous range of a group's flat buffer that is reduced at once."""

    group: str
    start: int
    stop: int
    tensors: tuple[str, ...]
    """The trained tensors in it."""
    last: bool = False
    """It holds the group's statistics, which are there only when the backward pass is over."""


def plan_buckets(layouts: Mapping[str, Layout], size_mb: float) -> list[Bucket]:
    """Cut groups into buckets, in the one order in which every process reduces those it has a part in.

    The backward pass reaches the tensors of a network from its end, so each group's weights go from back to front, and
    several groups take turns by how far they are; scales, shifts and statistics, of which the first layer has some,
    come last.

    Args:
        layouts: group -> its layout.
        size_mb: a bucket closes when it holds so many MB (2 ** 20 bytes of float32); no tensor is cut.
    """
    ordered: list[tuple[float, Bucket]] = []
    for group, layout in layouts.items():
        stop = layout.ends[Role.DECAYED]
        weights = max(1, stop)
        waiting: list[str] = []
        for slot in reversed([slot for slot in layout.slots if slot.role is Role.DECAYED]):
            waiting.append(slot.name)
            if FLOAT_BYTES * (stop - slot.offset) >= size_mb * 2**20 or slot.offset == 0:
                ordered.append((1 - slot.offset / weights, Bucket(group, slot.offset, stop, tuple(waiting))))
                stop, waiting = slot.offset, []
        if layout.pushed > layout.ends[Role.DECAYED]:
            names = tuple(slot.name for slot in layout.slots if slot.role is Role.PLAIN)
            ordered.append((2.0, Bucket(group, layout.ends[Role.DECAYED], layout.pushed, names, last=True)))
    return [bucket for _, bucket in sorted(ordered, key=lambda pair: pair[0])]


class Reduction:
    """One process's part in the sums over all processes that use a group.

    The sums lie in buffers of their own: where a gradient turns out not to be finite, the others' are summed again.
    """

    def __init__(
        self,
        plan: Sequence[Bucket],
        gradients: Mapping[str, Tensor],
        members: Mapping[str, dist.ProcessGroup],
        device: torch.device | None = None,
    ) -> None:
        """Args:
        plan: what `plan_buckets` returned, the same in every process.
        gradients: group -> flat gradients and statistics, shape (layout.pushed,), that backward passes fill.
        members: group -> the processes that use it; groups that this process uses alone are left out.
        device: where the sums lie; beside the gradients by default.
        """
        self._plan = [bucket for bucket in plan if bucket.group in members]
        self._gradients, self._members = gradients, members
        self._sums = {name: torch.empty_like(gradients[name], device=device) for name in members}
        self._factors: dict[str, float | None] | None = None
        self._missing: list[int] = []
        self._next = 0
        self._works: list[dist.Work] = []

    def watch(self, parameters: Mapping[str, Tensor]) -> None:
        """Start buckets from the backward pass, as soon as all gradients in them are there.

        Args:
            parameters: name -> trained parameter whose gradient is a view of the flat buffers.
        """
        for index, bucket in enumerate(self._plan):
            for name in bucket.tensors:
                parameters[name].register_post_accumulate_grad_hook(partial(self._ready, index))

    def arm(self, factors: Mapping[str, float | None]) -> None:
        """The next backward pass is the step's last: its gradients may leave.

        Args:
            factors: group -> what this process's gradients are multiplied by; None for no part in the sum.
        """
        self._factors = dict(factors)
        self._missing = [len(bucket.tensors) + bucket.last for bucket in self._plan]
        self._next = 0
        self._works = []

    @property
    def armed(self) -> bool:
        return self._factors is not None

    def finish(self) -> dict[str, Tensor]:
        """Start what is left and wait for all.

        Returns:
            Group -> sum over the processes that use it, shape (layout.pushed,); valid until the next step.
        """
        self.flush()
        with peers():
            for work in self._works:
                work.wait()
        self._factors = None
        return self._sums

    def flush(self) -> None:
        """Start every bucket that has not started: the step's gradients and statistics are all there."""
        while self._next < len(self._plan):
            self._start_next()

    def again(self, group: str, factor: float | None) -> Tensor:
        """Sum one group once more, with other factors."""
        piece = self._sums[group]
        self._contribute(piece, self._gradients[group], factor)
        with peers():
            dist.all_reduce(piece, group=self._members[group])
        return piece

    def _ready(self, index: int, _parameter: Tensor) -> None:
        if self._factors is None:
            return
        self._missing[index] -= 1
        # In order, or two processes could wait for each other's buckets.
        while self._next < len(self._plan) and self._missing[self._next] == 0:
            self._start_next()

    def _start_next(self) -> None:
        assert self._factors is not None, "a step's buckets start after `arm`"
        bucket = self._plan[self._next]
        self._next += 1
        where = slice(bucket.start, bucket.stop)
        piece = self._sums[bucket.group][where]
        self._contribute(piece, self._gradients[bucket.group][where], self._factors[bucket.group])
        with peers():
            work = dist.all_reduce(piece, group=self._members[bucket.group], async_op=True)
        assert work is not None, "this process is a member of the group"
        self._works.append(work)

    @staticmethod
    def _contribute(piece: Tensor, gradient: Tensor, factor: float | None) -> None:
        if factor is None:
            piece.fill_(NEUTRAL)
            return
        piece.copy_(gradient)
        if factor != 1.0:
            piece.mul_(factor)
