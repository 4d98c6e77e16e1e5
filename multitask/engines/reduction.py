"""Sum gradients among processes, in buckets, while the backward pass is still running.

This file knows flat buffers and processes that sum them, and nothing of Ray, tasks or rounds.
Source: Li et al., "PyTorch Distributed", VLDB 2020, arXiv:2006.15704: buckets in a fixed order, started by hooks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from multitask.cluster.collectives import Members, Sum
from multitask.server.layout import Layout, Role

NEUTRAL = -0.0
"""Adding it changes no bit of any float; adding +0.0 would turn -0.0 into +0.0."""
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Bucket:
    """A contiguous range of a group's flat buffer that is summed by one all_reduce."""

    group: str
    start: int
    stop: int
    tensors: tuple[str, ...]
    """Names of the trained tensors in this range."""
    last: bool = False
    """The range includes the group's batch statistics, which are complete only after the backward pass."""


def plan_buckets(layouts: Mapping[str, Layout], size_mb: float) -> list[Bucket]:
    """Cut groups into buckets, and return them in the order in which every process starts them.

    The backward pass computes gradients from the network's last layer to its first. So the buckets of each group's
    weights are ordered from back to front, and buckets of several groups are interleaved by their relative distance
    from the end. Scales, shifts and statistics come last, because the first layer has some too, and its gradients are
    the last that the backward pass computes.

    Args:
        layouts: group -> its layout.
        size_mb: a bucket is full when it holds this many MB (2 ** 20 bytes) of float32; tensors are never cut.
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
    """One process's part in the sums of gradients over all processes that use a group.

    In each step: `arm`, then the backward pass, during which hooks start the buckets, then `flush` and `finish`.

    The sums have buffers of their own, so that the gradients are still there when one process's gradient is not finite
    and the others must be summed `again`.
    """

    def __init__(
        self,
        plan: Sequence[Bucket],
        gradients: Mapping[str, Tensor],
        members: Mapping[str, Members],
        device: torch.device | None = None,
    ) -> None:
        """Args:
        plan: the result of `plan_buckets`, equal in every process.
        gradients: group -> flat gradients and batch statistics, shape (layout.pushed,), filled by backward passes.
        members: group -> the processes that use it; without groups that only this process uses.
        device: holds the sums; by default the device of the gradients.
        """
        self._plan = [bucket for bucket in plan if bucket.group in members]
        self._gradients, self._members = gradients, members
        self._sums = {name: torch.empty_like(gradients[name], device=device) for name in members}
        self._factors: dict[str, float | None] | None = None
        """The step's factors; None before `arm` and after `finish`."""
        self._missing: list[int] = []
        """For each bucket: gradients, and statistics, that are not complete yet."""
        self._next = 0
        """Index of the first bucket that has not started."""
        self._started: list[Sum] = []

    def watch(self, parameters: Mapping[str, Tensor]) -> None:
        """Let backward passes start each bucket as soon as all its gradients are complete.

        Args:
            parameters: name -> trained parameter whose gradient is a view of the flat buffers.
        """
        for index, bucket in enumerate(self._plan):
            for name in bucket.tensors:
                parameters[name].register_post_accumulate_grad_hook(partial(self._ready, index))

    def arm(self, factors: Mapping[str, float | None]) -> None:
        """Prepare for the step's last backward pass, whose gradients are final.

        Args:
            factors: group -> factor of this process's gradients in the sum; None if they do not enter it.
        """
        self._factors = dict(factors)
        self._missing = [len(bucket.tensors) + bucket.last for bucket in self._plan]
        self._next = 0
        self._started = []

    @property
    def armed(self) -> bool:
        """Whether `arm` was called for this step."""
        return self._factors is not None

    def finish(self) -> dict[str, Tensor]:
        """Start the remaining buckets and wait for all sums.

        Returns:
            Group -> sum over the processes that use it, shape (layout.pushed,); overwritten in the next step.
        """
        self.flush()
        for started in self._started:
            started.wait()
        self._factors = None
        return self._sums

    def flush(self) -> None:
        """Start all buckets that have not started, when the step's gradients and statistics are complete."""
        while self._next < len(self._plan):
            self._start_next()

    def again(self, group: str, factor: float | None) -> Tensor:
        """Sum one group once more, with another factor; all processes that use the group must call this."""
        piece = self._sums[group]
        self._contribute(piece, self._gradients[group], factor)
        self._members[group].start_sum(piece).wait()
        return piece

    def _ready(self, index: int, _parameter: Tensor) -> None:
        """Count a complete gradient of a bucket, and start the buckets that can start."""
        if self._factors is None:
            return
        self._missing[index] -= 1
        # All processes start buckets in the same order; otherwise two could wait for each other's buckets for ever.
        while self._next < len(self._plan) and self._missing[self._next] == 0:
            self._start_next()

    def _start_next(self) -> None:
        assert self._factors is not None, "`arm` must be called before a step's buckets start"
        bucket = self._plan[self._next]
        self._next += 1
        where = slice(bucket.start, bucket.stop)
        piece = self._sums[bucket.group][where]
        self._contribute(piece, self._gradients[bucket.group][where], self._factors[bucket.group])
        self._started.append(self._members[bucket.group].start_sum(piece))

    @staticmethod
    def _contribute(piece: Tensor, gradient: Tensor, factor: float | None) -> None:
        """Write this process's contribution to a sum into the buffer of the sum."""
        if factor is None:
            piece.fill_(NEUTRAL)
            return
        piece.copy_(gradient)
        if factor != 1.0:
            piece.mul_(factor)
