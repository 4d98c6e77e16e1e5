"""A shard of the parameter server: a contiguous range of every group, and the pushes that wait for their turn."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from multitask.server.group import ParameterGroup
from multitask.server.messages import Gradients, GroupValues, Key, as_tensor, is_finite


@dataclass(frozen=True)
class GroupUpdate:
    """One step of one group: whose gradients are averaged, in this order, with which weights, at which rate."""

    pushes: tuple[Key, ...]
    weights: tuple[float, ...]
    rate: float


Update = dict[str, GroupUpdate]
"""Group -> its step. Every shard makes the same updates in the same order."""


class OtherShards(Protocol):
    """The shards in other processes, which do the same as the shard in the server's process, in the same order."""

    def apply(self, update: Update, done: Iterable[Key]) -> None: ...
    def take_snapshot(self, version: int, slots: bool) -> None: ...
    def drop_snapshot(self, version: int) -> None: ...


class Shard:
    """Holds values and optimiser slots; what is applied, when and at which rate, `ParameterServer` decides."""

    def __init__(self, groups: Mapping[str, ParameterGroup]) -> None:
        self.groups = dict(groups)
        self.stashed: dict[Key, Gradients] = {}
        """Push -> its gradients, until the push is applied or replaced by a later one."""
        self._snapshots: dict[int, dict[str, GroupValues]] = {}
        self._sums: dict[str, Tensor] = {}
        """Group -> where several pushes are added up: memory that is new each time costs more than adding."""

    def stash(self, key: Key, gradients: Gradients, names: Iterable[str]) -> str | None:
        """Take in a push's range, to be applied later.

        Args:
            names: the groups that the worker's task uses.
        Returns:
            What is wrong with it, if anything: then it is not kept.
        """
        wanted = {name: self.groups[name].size for name in names if self.groups[name].size}
        found = {name: gradient.size for name, gradient in gradients.items()}
        if found != wanted or any(gradient.dtype != np.float32 for gradient in gradients.values()):
            return f"it carries floats per group {found}; expected float32 {wanted}"
        for name, gradient in gradients.items():
            if not is_finite(as_tensor(gradient)):
                return f"it holds a gradient that is not finite in group '{name}'"
        self.stashed[key] = gradients
        return None

    def apply(self, update: Update, done: Iterable[Key]) -> None:
        """One step of each named group, then forget the pushes that are done with, and those before them of the same
        workers, which were turned away.
        """
        for name, step in update.items():
            group = self.groups[name]
            if group.size:
                gradients = [as_tensor(self.stashed[key][name]) for key in step.pushes]
                if len(gradients) > 1 and name not in self._sums:
                    self._sums[name] = torch.empty_like(gradients[0])
                group.apply(mean(gradients, step.weights, self._sums.get(name)), step.rate)
        newest = {key[0]: key for key in done}
        self.stashed = {key: pushed for key, pushed in self.stashed.items() if key > newest.get(key[0], ())}

    def take_snapshot(self, version: int, slots: bool) -> None:
        """Put the values aside as they stand, with the optimiser's slots where a checkpoint is to be saved."""
        if (
            slots or version not in self._snapshots
        ):  # a second reason to keep a version does not drop the first one's slots
            self._snapshots[version] = {name: group.state(slots) for name, group in self.groups.items()}

    def snapshot(self, version: int) -> dict[str, GroupValues] | None:
        """What was put aside; None where this process knows of no such version."""
        return self._snapshots.get(version)

    def drop_snapshot(self, version: int) -> None:
        self._snapshots.pop(version, None)


def shares(weights: Sequence[float]) -> tuple[tuple[float, ...], float]:
    """A weighted mean's factors and the divisor of its sum: equal weights cancel, whatever they are."""
    if len(set(weights)) == 1:
        return (1.0,) * len(weights), float(len(weights))
    return tuple(weights), sum(weights)


def mean(gradients: Sequence[Tensor], weights: Sequence[float], out: Tensor | None = None) -> Tensor:
    """Weighted mean, added up in the order given.

    Args:
        out: where several gradients are added up; new memory by default.
    """
    if len(gradients) == 1:
        return gradients[0]
    factors, divisor = shares(weights)
    terms = (g if factor == 1.0 else g * factor for g, factor in zip(gradients, factors, strict=True))
    total = torch.add(next(terms), next(terms), out=out)
    for term in terms:
        total += term
    return total.div_(divisor)
