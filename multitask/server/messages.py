"""The messages between workers, server and driver, and the errors that cross process borders."""

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


class PushRejectedError(ValueError):
    """The server rejected a call of a worker and changed no value; the message says why.

    A push whose gradients have a problem raises no error: its reply carries the reason.
    """


class OutOfStepError(PushRejectedError):
    """A push does not follow on what the server has: the worker or the server went back to an earlier moment."""


@dataclass(frozen=True)
class Push:
    """One step of one worker, as the server hears of it. The gradients travel beside it, one part for each shard."""

    worker: str
    step: int
    """Number of the step among this worker's steps, from 0. The server applies each step exactly once."""
    version: int
    """Version of the values that the gradients were computed on."""
    loss: float
    images: int
    seconds: float
    """Time from the start of loading the batch to the end of the backward pass."""
    position: int = 0
    """Number of rows that the worker's data stream has consumed after this step's batch."""
    incarnation: int = 0
    """Number of the process among all processes that the worker has had. Late pushes of earlier ones are rejected."""
    skipped: int = 0
    """Number of undecodable images that were skipped while the batch was loaded."""
    bad_images: tuple[str, ...] = ()
    """File, row and fault of each skipped image that this worker meets for the first time."""
    pid: int = 0
    """Process id of the worker, for people who look for the process."""
    problem: str | None = None
    """What the worker found wrong with its gradients, the private ones included; the server then rejects the push."""

    @property
    def key(self) -> "Key":
        """The name of the push at the shards, where a push of an earlier process of the worker may arrive late."""
        return self.worker, self.incarnation, self.step

    def staleness(self, version: int) -> int:
        """Return how many updates lie between the push's own version and the server's `version`."""
        return version - self.version


Key = tuple[str, int, int]
"""Worker, incarnation and step, which together name a push."""
Gradients = dict[str, np.ndarray]
"""Group on the server -> flat float32: gradients, then batch statistics; of the whole group or of a shard's range."""


@dataclass(frozen=True)
class GroupValues:
    """The values that training changes in a group, or in one shard's range of a group."""

    values: np.ndarray
    """Flat float32, shape (layout.pushed,) or the shape of the range."""
    counters: np.ndarray
    """int64, shape (layout.counters,)."""
    slots: dict[str, np.ndarray] = field(default_factory=dict)
    """The optimiser's slots, each flat float32 over the trained values (layout.trained,); empty unless asked for."""
    scalars: dict[str, float] = field(default_factory=dict)
    """The optimiser's single numbers, such as Adam's count of steps; empty unless asked for."""


def whole(parts: Sequence[GroupValues]) -> GroupValues:
    """Join the ranges of a group's shards, given in order, into the whole group."""
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
    """What a worker is asked to report about a snapshot; `multitask.server.snapshots` explains it."""

    version: int
    evaluate: bool
    """Each task reports its validation metrics."""
    save: bool
    """Each worker reports its private tensors, with their optimiser."""
    steps: int = 0
    """Number of the worker's steps that the version contains."""
    server_incarnation: int = 0
    """Number of the server's process: a restored server reaches the same versions again, with other values."""


@dataclass(frozen=True)
class Reply:
    """The server's answer to a worker's push. The newest values of the task's groups travel beside it."""

    version: int
    """Version of the values that travel beside the reply."""
    rate: float
    """The rate with which the worker applies its private gradients."""
    requests: tuple[SnapshotRequest, ...] = ()
    """Snapshots that wait for a report of this worker, oldest version first."""
    rejected: str | None = None
    """Why the answered push was not applied; None if it was."""
    pause: bool = False
    """True: the worker makes no more steps, reports what is asked for, and returns."""
    step: int = 0
    """Number of the worker's next step."""
    position: int = 0
    """Position of the worker's data stream after its last step."""


@dataclass(frozen=True)
class StepRecord:
    """What the server notes about a push."""

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
    """Number of workers that were waiting for others when the push arrived."""
    rejected: str | None = None
    """Why the push was not applied; None if it was."""
    redone: bool = False
    """True for a step that was made again after its worker was lost. Only the private tensors learn from it."""


@dataclass(frozen=True)
class Evaluation:
    """The validation metrics of all tasks at one version."""

    version: int
    round: int
    metrics: dict[str, dict[str, float]]
    """Task -> top1 and top5 in percent, loss."""
    best: bool
    """True if the mean top-1 is above that of every version evaluated before."""
    groups: dict[str, GroupValues]
    """The values of the version: shared groups, and private groups as of their task's last push up to it."""
    server: int
    """Incarnation of the server that evaluated it. Another server's version of the same number has other values."""

    @property
    def mean_top1(self) -> float:
        """Mean top-1 accuracy over all tasks, in percent."""
        return mean_top1(self.metrics.values())


def mean_top1(tasks: Iterable[dict[str, float]]) -> float:
    """Return the mean top-1 accuracy over tasks, in percent, from the metrics of each task."""
    values = [task["top1"] for task in tasks]
    return sum(values) / len(values)


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has no NaN and no infinity. One pass over memory, where `torch.isfinite` takes three."""
    return not tensor.numel() or all(map(math.isfinite, (float(end) for end in tensor.aminmax())))


def as_tensor(array: np.ndarray) -> Tensor:
    """Return the array as a tensor, without a copy. Never write to it: arrays from Ray's object store are read-only."""
    _let_torch_warn()
    return torch.from_numpy(array)


@functools.cache
def _let_torch_warn() -> None:
    """Let torch warn here of arrays that are read-only, which it has no tensors for: it does so once in a process."""
    array = np.zeros(1)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.from_numpy(array)
