"""The gradients of one step: forward and backward passes over its batches, and clipping."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from multitask.data import Batch
from multitask.data.feature_cache import FeatureCache
from multitask.errors import TrainingError
from multitask.server.messages import is_finite
from multitask.worker.buffers import ModelBuffers
from multitask.worker.learner import StepResult
from multitask.worker.mixing import Mix
from patches import PatchedModel

ONE_AT_A_TIME = threading.Lock()
"""Held by the worker that computes, where one process runs several: torch has one random generator per process."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How a worker computes the gradients of a step."""

    accumulate: int
    """Batches of one step."""
    precision: torch.dtype
    """torch.float32, or the dtype for autocast: operations that torch considers safe in it run in this dtype."""
    clip_norm: float | None
    """Largest L2 norm of a step's gradients, over all groups together; longer ones are scaled. None: no clipping."""
    loss: Callable[[Any, Tensor], Tensor]
    """From the model's outputs and the labels, (B,) or shares of the classes (B, C), to the mean loss."""
    mix: Mix | None
    """Mixes the images of a batch and their labels; None leaves both as they are."""
    device: torch.device
    """Holds the model and its gradients."""
    seed: int
    """With the worker's name and the step, it decides the random numbers of dropout, stochastic depth and mixing."""


class GradientComputer:
    """Fills the gradient buffers of one worker's model."""

    def __init__(
        self,
        name: str,
        model: PatchedModel,
        buffers: ModelBuffers,
        batches: Iterator[Batch],
        settings: StepSettings,
        cache: FeatureCache | None,
    ) -> None:
        """Args:
        name: the worker's name.
        buffers: hold the tensors of `model`.
        cache: stores the features that the frozen backbone computes for images that have none yet.
        """
        self._name, self._model, self._buffers = name, model, buffers
        self._batches, self._settings, self._cache = batches, settings, cache

    def compute(self, step: int, before_last_backward: Callable[[], None]) -> StepResult:
        """Run forward and backward on the next `accumulate` batches.

        Gradients, batch statistics and loss are means over these batches.

        Args:
            before_last_backward: called once before the last backward pass, unless gradients are clipped: clipping
                changes all of them after that pass.
        Raises:
            TrainingError: the loss is not finite.
        """
        accumulate, clip_norm = self._settings.accumulate, self._settings.clip_norm
        loss, images, skipped = 0.0, 0, 0
        bad_images: tuple[str, ...] = ()
        with ONE_AT_A_TIME, _random_numbers(self._settings, self._name, step):
            start = time.perf_counter()
            self._buffers.zero_gradients()
            for number in range(accumulate):
                batch = next(self._batches)
                if number == accumulate - 1 and clip_norm is None:
                    before_last_backward()
                loss += self._add_gradients(batch, step)
                images += len(batch.labels)
                skipped += batch.skipped
                bad_images += batch.bad_images
        problem = None if clip_norm is None else self._clip(clip_norm)
        seconds = time.perf_counter() - start
        return StepResult(loss, images, seconds, batch.position, skipped, bad_images, problem)

    def keep_features(self) -> None:
        """Write the features that still wait in memory to the cache."""
        if self._cache is not None:
            self._cache.flush()

    def _add_gradients(self, batch: Batch, step: int) -> float:
        """Run forward and backward on one batch; return the batch's share of the step's loss."""
        device, precision, accumulate = self._settings.device, self._settings.precision, self._settings.accumulate
        images = None if batch.pixels is None else batch.images(device)
        labels = batch.labels.to(device)
        if self._settings.mix is not None:
            assert images is not None, "a task whose images are mixed stores no features"
            images, labels = self._settings.mix(images, labels)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss = self._settings.loss(self._outputs(batch, images), labels) / accumulate
        loss.backward()
        loss_value = loss.item()
        if not math.isfinite(loss_value):
            raise TrainingError(
                f"the loss is {loss_value} at step {step}. Lower optimizer.rate, or look at the task's images and "
                "labels."
            )
        self._buffers.add_batch_statistics(1 / accumulate)
        return loss_value

    def _outputs(self, batch: Batch, images: Tensor | None) -> Any:
        """Return the model's outputs for the images of a batch.

        Features of the frozen backbone that come with the batch are not computed again. With a cache, features that
        had to be computed are stored.
        """
        device = self._settings.device
        if images is not None:
            images = images.contiguous(memory_format=torch.channels_last)
        if batch.features is not None:
            shared = {step: feature.to(device) for step, feature in batch.features.items()}
        elif self._cache is None:
            return self._model(images)
        else:
            assert images is not None
            assert batch.rows is not None
            shared = self._model.shared_part(images)
            self._cache.add(batch.rows, batch.labels.numpy(), shared)
        return self._model.own_part(images, shared)

    def _clip(self, clip_norm: float) -> str | None:
        """Scale gradients longer than `clip_norm`, and leave the batch statistics in the same buffers as they are.

        Returns:
            What is wrong with the gradients; None if they could be clipped.
        """
        norm = clip_grad_norm_(self._model.network.parameters(), clip_norm).item()
        return None if math.isfinite(norm) else f"its gradient's norm is {norm}, which cannot be clipped"


@contextlib.contextmanager
def _random_numbers(settings: StepSettings, worker: str, step: int) -> Iterator[None]:
    """Seed torch for one step of one worker, and restore torch's random state after the block.

    The seed does not depend on the process that makes the step, on the steps before it, or on how often it is made.
    """
    entropy = np.random.SeedSequence([settings.seed, step, *worker.encode()])
    with torch.random.fork_rng([settings.device] if settings.device.type == "cuda" else []):
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        yield


def problem_of(gradients: Mapping[str, Tensor]) -> str | None:
    """Return why a push with these gradients must be rejected; None if all values are finite.

    Args:
        gradients: group -> flat gradients and batch statistics.
    """
    bad = [group for group, gradient in gradients.items() if not is_finite(gradient)]
    return f"it holds a gradient that is not finite in group '{bad[0]}'" if bad else None


def task_loss(
    outputs: Any,
    labels: Tensor,
    *,
    label_smoothing: float,
    auxiliary_weight: float,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of logits (B, C), averaged over the batch.

    A backbone with an auxiliary branch gives two logits; the second one's loss is added with its weight.

    Args:
        labels: shape (B,), int64; or the share of each class in each image, shape (B, C), whose sums are 1.
        class_weights: shape (C,): the average of losses l_i becomes sum_i w_i l_i / sum_i w_i, where w_i is the weight
            of image i's class, or the mean weight of its shares. Without them, all images count alike.
    Source: Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016: auxiliary classifier and smoothing.
        With class weights, smoothing is torch's: the part of the label that is spread over all classes has their
        weights in the numerator, and the denominator has those of the labels before smoothing.
    """
    loss = partial(_cross_entropy, labels=labels, label_smoothing=label_smoothing, class_weights=class_weights)
    if isinstance(outputs, tuple):
        logits, auxiliary = outputs
        auxiliary_loss = loss(auxiliary)
        return loss(logits) + auxiliary_weight * auxiliary_loss
    return loss(outputs)


def _cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float, class_weights: Tensor | None) -> Tensor:
    """Return the weighted average of the cross-entropies of a batch."""
    loss = functional.cross_entropy(logits, labels, class_weights, label_smoothing=label_smoothing)
    if labels.ndim == 1 or class_weights is None:
        return loss
    # Where labels are shares of classes, torch divides the sum by the number of images, not by that of their weights.
    return loss * len(labels) / (labels * class_weights).sum()
