"""What travels between workers and the server, and the errors that cross process borders."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


class PushRejectedError(ValueError):
    """A push that the server did not apply; the message says why. Nothing was changed."""


@dataclass(frozen=True)
class Push:
    """One step of one worker, on its way to the server."""

    worker: str
    step: int
    """Counts this worker's steps from 0; the server applies each exactly once."""
    version: int
    """Version of the server's values that the gradients were computed on."""
    gradients: dict[str, np.ndarray]
    """Group -> flat float32, shape (layout.pushed,): gradients, then batch statistics. Groups on the server only."""
    loss: float
    images: int
    seconds: float
    """From the start of loading the batch to the end of the backward pass."""
    skipped: int = 0
    """Undecodable images passed over while loading the batch."""
    bad_images: tuple[str, ...] = ()
    """Those of them that are met for the first time: file, row and what is wrong."""


@dataclass(frozen=True)
class GroupValues:
    """What training changes of a group's values."""

    values: np.ndarray
    """Flat float32, shape (layout.pushed,)."""
    counters: np.ndarray
    """int64, shape (layout.counters,)."""


@dataclass(frozen=True)
class Reply:
    """The newest values of the groups that a worker's task uses."""

    version: int
    """Pushes that these values contain."""
    applied_version: int
    """The version that this worker's latest push made; `version`, unless the push is answered a second time."""
    rate: float
    """The rate that the push was applied with; a worker applies its private gradients with the same."""
    groups: dict[str, GroupValues]
    pending: tuple[int, ...]
    """Versions put aside that wait for this task's metrics, oldest first."""


@dataclass(frozen=True)
class StepRecord:
    """What the server notes of an applied push."""

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


@dataclass(frozen=True)
class Evaluation:
    """One version's validation metrics, complete for all tasks."""

    version: int
    round: int
    metrics: dict[str, dict[str, float]]
    """Task -> top1 and top5 in percent, loss."""
    best: bool
    """Its mean top-1 is above that of every version before it."""

    @property
    def mean_top1(self) -> float:
        return sum(task["top1"] for task in self.metrics.values()) / len(self.metrics)


@dataclass
class Snapshot:
    """One version of all tensors, put aside: shared ones at once, each task's private ones as they are handed in."""

    version: int
    round: int
    groups: dict[str, GroupValues]
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)


def as_tensor(array: np.ndarray) -> Tensor:
    """The array as a tensor that may be written to: what comes out of Ray's object store is read-only."""
    return torch.from_numpy(np.require(array, requirements="W"))
