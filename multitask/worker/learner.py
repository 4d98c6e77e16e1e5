"""What computes the gradients of a worker's steps, as the worker sees it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from multitask.server.messages import GroupValues
from multitask.worker.server import Values


@dataclass(frozen=True)
class StepResult:
    """What a step found, beside the gradients themselves."""

    loss: float
    """Mean over the step's batches."""
    images: int
    seconds: float
    """From the start of loading the first batch to the end of clipping."""
    position: int
    """Position of the data stream after the last batch."""
    skipped: int
    """Undecodable images that the batches passed over."""
    bad_images: tuple[str, ...]
    """Those undecodable images that were met for the first time."""
    problem: str | None
    """Why the gradients must not be applied, which only clipping finds out here; otherwise None."""


class Learner(Protocol):
    """A model with its training and validation data. It computes gradients, and knows nothing of servers and rounds.

    `multitask.worker.network_learner` has the implementation with a network. A simulation has another one.
    """

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        """Group -> the step's gradients, then its batch statistics: shape (layout.pushed,), always the same buffers."""

    @property
    def evaluates(self) -> bool:
        """Whether `evaluate` can be called: one worker of each task has the validation data."""

    def load(self, values: Values) -> None:
        """Overwrite the part of each given group that training changes."""

    def compute(self, step: int, before_last_backward: Callable[[], None]) -> StepResult:
        """Fill `gradients` from the next batches.

        Args:
            step: number of the step among the worker's steps.
            before_last_backward: called once before the backward pass that completes the gradients; never where they
                are clipped.
        Raises:
            TrainingError: the loss is not finite.
        """

    def evaluate(
        self, values: Values, private: Mapping[str, GroupValues], alive: Callable[[], None]
    ) -> dict[str, float]:
        """Return the validation metrics (top1 and top5 in percent, loss) of one version; restore the present values.

        Args:
            values: the groups on the server.
            private: the groups that the worker holds.
            alive: called every few seconds.
        """

    def keep_features(self) -> None:
        """Write computed features of the frozen backbone that still wait in memory to the cache."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Return name -> the model's own tensor, under the names of the layouts. The gradients of trained parameters
        are views of `gradients`."""

    def private_state(self) -> dict[str, Tensor]:
        """Return name -> the task's private tensor, a view of the present values."""
