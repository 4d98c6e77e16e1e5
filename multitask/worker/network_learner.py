"""A network with its training and validation data, as a worker's learner."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor

from multitask.data import Batch
from multitask.data.feature_cache import FeatureCache
from multitask.evaluation import evaluate
from multitask.server.layout import Layout, named_tensors
from multitask.server.messages import GroupValues
from multitask.worker.buffers import ModelBuffers
from multitask.worker.gradients import GradientComputer, StepSettings
from multitask.worker.learner import StepResult
from multitask.worker.server import Values
from patches import PatchedModel

ALIVE_S = 10.0
"""Seconds between two signs of life while a worker evaluates."""


class NetworkLearner:
    """One worker's model and data (`multitask.worker.Learner`)."""

    def __init__(
        self,
        name: str,
        model: PatchedModel,
        *,
        layouts: Mapping[str, Layout],
        initial: Mapping[str, tuple[Tensor, Tensor]],
        batches: Iterator[Batch],
        settings: StepSettings,
        validation: Callable[[], Iterable[Batch]] | None,
        cache: FeatureCache | None,
    ) -> None:
        """Args:
        name: the worker's name.
        layouts: group -> its layout, for all groups that the model holds.
        initial: group -> values (layout.size,) and counters (layout.counters,) at the start.
        batches: the training stream, from the worker's start position on.
        validation: makes an iterator over the validation images; None for a worker that does not evaluate.
        cache: stores the features that the frozen backbone computes for images that have none yet.
        """
        self.model = model.train()
        self._validation = validation
        self._device = settings.device
        self._buffers = ModelBuffers(model.network, layouts, initial, settings.device)
        self._computer = GradientComputer(name, self.model, self._buffers, batches, settings, cache)

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        return self._buffers.gradients

    @property
    def evaluates(self) -> bool:
        return self._validation is not None

    def load(self, values: Values) -> None:
        self._buffers.load(values)

    def compute(self, step: int, before_last_backward: Callable[[], None]) -> StepResult:
        return self._computer.compute(step, before_last_backward)

    def evaluate(
        self, values: Values, private: Mapping[str, GroupValues], alive: Callable[[], None]
    ) -> dict[str, float]:
        assert self._validation is not None
        with self._buffers.restored():
            self._buffers.load(values)
            self._buffers.load({name: [group] for name, group in private.items()})
            metrics = evaluate(self.model, _with_signs_of_life(alive, self._validation()), self._device)
            self.model.train()
        return metrics

    def keep_features(self) -> None:
        self._computer.keep_features()

    def tensors(self) -> Mapping[str, Tensor]:
        return named_tensors(self.model.network)

    def private_state(self) -> dict[str, Tensor]:
        return dict(self.model.private_state())


def _with_signs_of_life(alive: Callable[[], None], batches: Iterable[Batch]) -> Iterator[Batch]:
    """Pass batches on, and call `alive` between two of them every few seconds."""
    called = time.monotonic()
    for batch in batches:
        if time.monotonic() - called > ALIVE_S:
            called = time.monotonic()
            alive()
        yield batch
