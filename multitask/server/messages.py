"""What travels between workers, server and driver, and the errors that cross process borders."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


class PushRejectedError(ValueError):
    """A push from a worker that this server does not know, or no longer; the message says why. Nothing was changed."""


class OutOfStepError(PushRejectedError):
    """A push that does not follow on what the server has: one of the two was restored to an earlier moment."""


@dataclass(frozen=True)
class Push:
    """One step of one worker, on its way to the server; the gradients travel beside it, a part for each shard."""

    worker: str
    step: int
    """Counts this worker's steps from 0; the server applies each exactly once."""
    version: int
    """Version of the server's values that the gradients were computed on."""
    loss: float
    images: int
    seconds: float
    """From the start of loading the batch to the end of the backward pass."""
    position: int = 0
    """Rows that the worker's data stream had consumed after this step's batch."""
    incarnation: int = 0
    """Counts the restarts of the worker's slot: what an earlier process of it sends late is rejected."""
    skipped: int = 0
    """Undecodable images passed over while loading the batch."""
    bad_images: tuple[str, ...] = ()
    """Those of them that are met for the first time: file, row and what is wrong."""
    pid: int = 0
    """The worker's process, for people who look for it."""
    problem: str | None = None
    """What is wrong with the part of the gradient that stays with the worker: then the push is rejected."""

    @property
    def key(self) -> "Key":
        """Names it at the shards, where what an earlier process of the worker sent may arrive late."""
        return self.worker, self.incarnation, self.step

    def staleness(self, version: int) -> int:
        """Return how many updates lie between the push's own version and the server's `version`."""
        return version - self.version


Key = tuple[str, int, int]
"""Worker, incarnation and step: names a push."""
Gradients = dict[str, np.ndarray]
"""Group -> flat float32: gradients, then batch statistics. The groups on the server only; whole, or a shard's range."""


@dataclass(frozen=True)
class GroupValues:
    """What training changes of a group, or of one shard's range of it."""

    values: np.ndarray
    """Flat float32, shape (layout.pushed,) or the range's."""
    counters: np.ndarray
    """int64, shape (layout.counters,)."""
    slots: dict[str, np.ndarray] = field(default_factory=dict)
    """The optimiser's slots, each flat float32 over the trained values (layout.trained,); only where asked for."""
    scalars: dict[str, float] = field(default_factory=dict)
    """The optimiser's single numbers, such as Adam's count of steps; only where asked for."""


def whole(parts: Sequence[GroupValues]) -> GroupValues:
    """A group from its shards' ranges, in order."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return GroupValues(
        np.concatenate([part.values for part in parts]),
        first.counters,
        {name: np.concatenate([part.slots[name] for part in parts]) for name in first.slots},
        first.scalars,
    )


@dataclass(frozen=True)
class SnapshotRequest:
    """A version that was put aside and waits for what the workers hold of it."""

    version: int
    evaluate: bool
    """Each task hands in its validation metrics."""
    save: bool
    """Each worker hands in its private tensors, with their optimiser."""
    server_incarnation: int = 0
    """Names the server's process: one that was restored comes to the same versions again, with other values."""


@dataclass(frozen=True)
class Reply:
    """How the server stands after a worker's push; the newest values of the groups it uses come beside it."""

    version: int
    """Pushes that the values contain."""
    applied_version: int
    """The version that this worker's latest push made; `version`, unless the push is answered a second time."""
    rate: float
    """The rate of this task's private tensors; a worker applies its private gradients with it."""
    requests: tuple[SnapshotRequest, ...] = ()
    """Versions put aside that wait for this worker, oldest first."""
    rejected: str | None = None
    """Why the worker's latest push was not applied; None if it was."""
    pause: bool = False
    """Make no more steps, hand in what is held, and return."""
    step: int = 0
    """The worker's next step."""
    position: int = 0
    """Where the worker's data stream stood after its last step."""


@dataclass(frozen=True)
class StepRecord:
    """What the server notes of a push."""

    worker: str
    task: str
    step: int
    round: int
    version: int
    staleness: int
    rate: float
    loss: float
    images: int
    seconds: float
    skipped: int
    bad_images: tuple[str, ...]
    pid: int
    queue: int
    """Workers that were waiting for others when the push arrived."""
    rejected: str | None = None
    """Why the push was not applied; None if it was."""
    redone: bool = False
    """A step made again after its worker was lost: its private tensors learned from it, the shared ones did before."""


@dataclass(frozen=True)
class Evaluation:
    """One version's validation metrics, complete for all tasks."""

    version: int
    round: int
    metrics: dict[str, dict[str, float]]
    """Task -> top1 and top5 in percent, loss."""
    best: bool
    """Its mean top-1 is above that of every version before it."""
    groups: dict[str, GroupValues]
    """The version itself: shared groups, and each task's private ones as of its last push up to there."""

    @property
    def mean_top1(self) -> float:
        return mean_top1(self.metrics.values())


def mean_top1(tasks: Iterable[dict[str, float]]) -> float:
    values = [task["top1"] for task in tasks]
    return sum(values) / len(values)


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity; in one pass over memory, where `torch.isfinite` takes three."""
    return not tensor.numel() or all(map(math.isfinite, (float(end) for end in tensor.aminmax())))


def as_tensor(array: np.ndarray) -> Tensor:
    """The array as a tensor that may only be read: what comes out of Ray's object store is read-only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch knows no read-only tensors and says so
        return torch.from_numpy(array)
