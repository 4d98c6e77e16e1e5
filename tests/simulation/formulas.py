"""What the values of a toy job must be, in plain NumPy.

Nothing here uses the project's code except the messages, so that a check with these formulas cannot share a fault with
the code that it checks. `tests.simulation.toy` describes the job. All results are exact in float32 for powers of two as
rates, momentum 0 or 0.5, and up to 20 steps.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from multitask.server.messages import GroupValues

RANKS = 3
"""Largest number of workers of a task."""
STATISTICS = 2
"""Channels of each normalisation layer."""
NORM_MOMENTUM = 0.5
"""Momentum of the running statistics."""

Array = NDArray[np.float32]


# What the stream and the gradients are.


def batch_start(batch: int, rows: int, skips: bool) -> int:
    """Return the position of a stream before its batch number `batch` (from 0).

    Args:
        rows: number of rows of a batch.
        skips: every third batch passes over one undecodable row.
    """
    return batch * rows + (batch // 3 if skips else 0)


def batch_at(position: int, rows: int, skips: bool) -> int:
    """Return the number of the batch that begins at a position of a stream.

    Raises:
        ValueError: no batch begins there, so the position was not read after a batch of this stream.
    """
    batch = position // rows
    if skips:
        three, rest = divmod(position, 3 * rows + 1)
        batch = 3 * three + min(rest // rows, 2)
    if batch_start(batch, rows, skips) != position:
        raise ValueError(f"No batch of {rows} rows begins at position {position}.")
    return batch


def amount(task: str, batch: int) -> int:
    """Return the size of the gradients of a task's private tensors, a whole number from 1 to 4."""
    return 1 + crc32(f"{task} {batch}".encode()) % 4


def loss_of(worker: str, batch: int) -> float:
    """Return the loss that a worker finds in a batch, a whole number from 1 to 16."""
    return 1.0 + crc32(f"{worker} {batch}".encode()) % 16


def batch_statistics(name: str, batch: int) -> tuple[Array, Array]:
    """Return the mean and the variance that a normalisation layer finds in a batch, each of shape (STATISTICS,).

    Args:
        name: the task for its private layer, and the worker for a shared one.
    """
    first = amount(name, batch)
    channels = np.arange(STATISTICS, dtype=np.float32)
    return channels + first, channels + 2 * first


def metrics_of(groups: Mapping[str, GroupValues]) -> dict[str, float]:
    """Return the validation metrics of a task: numbers that look random, and change with every bit of the values.

    Args:
        groups: all groups that the task uses and training changes.
    """
    return metrics_of_bytes([(groups[name].values, groups[name].counters) for name in sorted(groups)])


def metrics_of_bytes(groups: Iterable[tuple[NDArray[np.float32], NDArray[np.int64]]]) -> dict[str, float]:
    """Return what `metrics_of` returns.

    Args:
        groups: values (layout.pushed,) and counters (layout.counters,) of the groups, by the order of their names.
    """
    found = hash_of(array for group in groups for array in group)
    top1 = found % 10_000 / 100
    return {"top1": top1, "top5": (100 + top1) / 2, "loss": 1.0 + found % 7}


def hash_of(arrays: Iterable[NDArray[Any]]) -> int:
    """Return a whole number below 2 ** 32 that changes with every bit of the arrays."""
    found = 0
    for array in arrays:
        found = crc32(array, found)
    return found


# What the values are after updates.


@dataclass(frozen=True)
class ToyPush:
    """A push in an update."""

    row: int
    """Row of the worker in the tensor that counts: `ToyTask.row` + rank for shared groups, and the rank for private
    ones."""
    batch: int
    """Number of the batch that it was computed on."""
    weight: float = 1.0


@dataclass(frozen=True)
class ToyUpdate:
    """One update of a group: the pushes that were averaged, in the order in which they were added up."""

    pushes: tuple[ToyPush, ...]
    rate: float
    """Learning rate of the group."""


def mean(gradients: Sequence[Array], weights: Sequence[float]) -> Array:
    """Return the weighted mean of gradients, added up in the order given."""
    equal = len(set(weights)) == 1
    total = sum(
        gradient if equal else gradient * np.float32(weight)
        for gradient, weight in zip(gradients, weights, strict=True)
    )
    divisor = len(weights) if equal else sum(weights)
    return np.asarray(total / np.float32(divisor), np.float32)


class Momentum:
    """Stochastic gradient descent with momentum on one tensor, from zeros."""

    def __init__(self, shape: tuple[int, ...], momentum: float) -> None:
        self.values = np.zeros(shape, np.float32)
        self.slots = np.zeros(shape, np.float32)
        self._momentum = np.float32(momentum)

    def step(self, gradient: Array, rate: float) -> None:
        self.slots = self._momentum * self.slots + gradient
        self.values = self.values - np.float32(rate) * self.slots


def counts_after(updates: Iterable[ToyUpdate], shape: tuple[int, int], momentum: float = 0.0) -> Array:
    """Return the tensor `counts` of a shared group after updates.

    Args:
        shape: number of rows, and of steps.
    """
    tensor = Momentum(shape, momentum)
    for update in updates:
        gradients = [_one(shape, push.row, push.batch, -1.0) for push in update.pushes]
        tensor.step(mean(gradients, [push.weight for push in update.pushes]), update.rate)
    return tensor.values


def times_applied(counts: Array, rate: float, momentum: float = 0.0) -> NDArray[np.int64]:
    """Return how often each push of a shared group was applied, if each update has one push.

    Args:
        counts: the tensor `counts`: shape (rows, steps).
        rate: the constant learning rate.
        momentum: 0, or 0.5; with 0.5 a push that was applied once has moved its value by the rate to twice the rate.
    """
    return np.ceil(counts / np.float32(rate / (1.0 - momentum))).astype(np.int64)


@dataclass(frozen=True)
class PrivateTensors:
    """The private tensors of a task."""

    learned: Array
    """Shape (RANKS, steps): what was learned from each batch."""
    total: Array
    """Shape (1,): what was learned from all batches."""
    slots: tuple[Array, Array]
    """The momentum of the two tensors."""
    mean: Array
    """Running mean: shape (STATISTICS,)."""
    variance: Array
    """Running variance: shape (STATISTICS,)."""
    updates: int
    """Number of updates, which the normalisation layer counts."""


def private_after(task: str, updates: Iterable[ToyUpdate], steps: int, momentum: float) -> PrivateTensors:
    """Return the private tensors of a task after updates; a rejected push makes none.

    Args:
        steps: the job's steps.
    """
    learned, total = Momentum((RANKS, steps), momentum), Momentum((1,), momentum)
    running_mean, running_variance = np.zeros(STATISTICS, np.float32), np.ones(STATISTICS, np.float32)
    count = 0
    for update in updates:
        amounts = [amount(task, push.batch) for push in update.pushes]
        weights = [push.weight for push in update.pushes]
        by_batch = [
            _one((RANKS, steps), push.row, push.batch, -size) for push, size in zip(update.pushes, amounts, strict=True)
        ]
        learned.step(mean(by_batch, weights), update.rate)
        total.step(mean([np.full(1, -size, np.float32) for size in amounts], weights), update.rate)
        found = [batch_statistics(task, push.batch) for push in update.pushes]
        running_mean = _moved(running_mean, mean([one for one, _ in found], weights))
        running_variance = _moved(running_variance, mean([one for _, one in found], weights))
        count += 1
    slots = learned.slots, total.slots
    return PrivateTensors(learned.values, total.values, slots, running_mean, running_variance, count)


def steps_of_one(made: Iterable[int], rate: float) -> list[ToyUpdate]:
    """Return the updates of the private tensors of a task with one worker.

    Args:
        made: the steps that were not rejected, in their order.
        rate: the constant rate of the private tensors.
    """
    return [ToyUpdate((ToyPush(0, step),), rate) for step in made]


def _one(shape: tuple[int, int], row: int, batch: int, value: float) -> Array:
    found = np.zeros(shape, np.float32)
    found[row, batch] = value
    return found


def _moved(running: Array, batch: Array) -> Array:
    return batch - (batch - running) * np.float32(1.0 - NORM_MOMENTUM)
