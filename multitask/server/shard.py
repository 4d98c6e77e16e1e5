"""A shard of the parameter server: a contiguous range of every group, and the gradients that wait to be applied."""

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
    """One optimiser step of one group: the pushes whose gradients are averaged in this order, weights, and rate."""

    pushes: tuple[Key, ...]
    weights: tuple[float, ...]
    rate: float


Update = dict[str, GroupUpdate]
"""Group -> its optimiser step. Every shard makes the same updates in the same order."""


class OtherShards(Protocol):
    """The shards in other processes, which do the same as the shard in the server's process, in the same order."""

    def apply(self, update: Update, done: Iterable[Key]) -> None: ...
    def take_snapshot(self, version: int, slots: bool) -> None: ...
    def drop_snapshot(self, version: int) -> None: ...


class Shard:
    """Holds values and optimiser slots. `ParameterServer` decides what is applied, when and at which rate."""

    def __init__(self, groups: Mapping[str, ParameterGroup]) -> None:
        self.groups = dict(groups)
        self.stashed: dict[Key, Gradients] = {}
        """Push -> its gradients, until the push is applied or replaced by a later one."""
        self._snapshots: dict[int, dict[str, GroupValues]] = {}
        self._sums: dict[str, Tensor] = {}
        """Group -> memory in which gradients are added up. New memory for each sum costs more than the adding."""

    def stash(self, key: Key, gradients: Gradients, names: Iterable[str]) -> str | None:
        """Take in this shard's range of a push's gradients, to apply it later.

        Args:
            names: the groups that the worker's task uses.
        Returns:
            What is wrong with the gradients, which are then not kept; None if all is well.
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
        """Make one optimiser step of each group in the update, then forget gradients that are no longer needed.

        Args:
            done: pushes that are applied or rejected. Their gradients are forgotten, with all earlier ones of the same
                workers, which may come from a process that was replaced.
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
        """Keep a copy of the present values as a snapshot.

        Args:
            slots: copy the optimiser's slots too, for a checkpoint.
        """
        # An evaluation of a version that is already kept for a checkpoint must not drop the slots.
        if slots or version not in self._snapshots:
            self._snapshots[version] = {name: group.state(slots) for name, group in self.groups.items()}

    def snapshot(self, version: int) -> dict[str, GroupValues] | None:
        """Return the snapshot of a version; None where this process does not keep it."""
        return self._snapshots.get(version)

    def drop_snapshot(self, version: int) -> None:
        """Forget the snapshot of a version, if there is one."""
        self._snapshots.pop(version, None)


def shares(weights: Sequence[float]) -> tuple[tuple[float, ...], float]:
    """Return the factors of the terms of a weighted mean, and the divisor of their sum; equal weights become 1."""
    if len(set(weights)) == 1:
        return (1.0,) * len(weights), float(len(weights))
    return tuple(weights), sum(weights)


def mean(gradients: Sequence[Tensor], weights: Sequence[float], out: Tensor | None = None) -> Tensor:
    """Return the weighted mean of gradients, added up in the order given.

    Args:
        out: memory in which several gradients are added up; new memory by default.
    """
    if len(gradients) == 1:
        return gradients[0]
    factors, divisor = shares(weights)
    terms = (g if factor == 1.0 else g * factor for g, factor in zip(gradients, factors, strict=True))
    total = torch.add(next(terms), next(terms), out=out)
    for term in terms:
        total += term
    return total.div_(divisor)
