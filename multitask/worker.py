"""What one worker of a task does, step by step."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from multitask.data import Batch
from multitask.evaluation import evaluate
from multitask.server.group import ParameterGroup
from multitask.server.layout import Layout, Role, bind, training_norms
from multitask.server.messages import GroupValues, Push, Reply, as_tensor
from patches import PatchedModel


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the worker, its task and the step."""


class Server(Protocol):
    """How a worker reaches the parameter server: `multitask.engines` has one for each side of a process border."""

    def push(self, push: Push) -> Any:
        """Send a push; `wait` turns what this returns into the reply."""

    def wait(self, handle: Any) -> Reply: ...

    def call(self, method: str, *arguments: Any) -> Any:
        """Any other method of ParameterServer, waited for."""


def task_loss(outputs: Any, labels: Tensor, *, label_smoothing: float, auxiliary_weight: float) -> Tensor:
    """Cross-entropy of logits (B, C) with labels (B,), plus the auxiliary branch's where the backbone has one.

    Source: Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016: auxiliary classifier and smoothing.
    """
    if isinstance(outputs, tuple):
        logits, auxiliary = outputs
        auxiliary_loss = functional.cross_entropy(auxiliary, labels, label_smoothing=label_smoothing)
        return (
            functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
            + auxiliary_weight * auxiliary_loss
        )
    return functional.cross_entropy(outputs, labels, label_smoothing=label_smoothing)


class TaskWorker:
    """One worker's model, data and private tensors.

    The model's tensors are views of one flat buffer per group. A normalisation layer that learns its running
    statistics gets momentum 1, so that a forward pass leaves the batch's own mean and variance in the buffer; they
    travel with the gradients and meet the layer's real momentum where the group is kept.
    """

    def __init__(
        self,
        name: str,
        task: str,
        model: PatchedModel,
        *,
        layouts: Mapping[str, Layout],
        initial: Mapping[str, tuple[Tensor, Tensor]],
        private: Mapping[str, ParameterGroup],
        batches: Iterator[Batch],
        accumulate: int,
        precision: torch.dtype,
        clip_norm: float | None,
        loss: Callable[[Any, Tensor], Tensor],
        validation: Callable[[], Iterable[Batch]] | None,
        device: torch.device,
    ) -> None:
        """Args:
        name: unique in the run, for example "fashion/0".
        layouts: group -> its layout, for all groups that the model holds.
        initial: group -> values (layout.size,) and counters (layout.counters,) at the start.
        private: the groups that stay with this worker, kept on the CPU.
        accumulate: batches of one step.
        precision: torch.float32, or a dtype that forward pass and loss are cast to where torch holds it safe.
        clip_norm: longest gradient of a step, as an L2 norm over all groups; None leaves it alone.
        validation: makes an iterator over the validation images; None for a worker that does not evaluate.
        """
        self.name = name
        self.task = task
        self.model = model.train()
        self.validation = validation
        self._layouts = dict(layouts)
        self._private = dict(private)
        self._batches = batches
        self._accumulate = accumulate
        self._precision = precision
        self._clip_norm = clip_norm
        self._loss = loss
        self._device = device
        self._step = 0
        self._version = 0
        self._seen: set[int] = set()
        self._values = {group: initial[group][0].to(device, copy=True) for group in layouts}
        self._counters = {group: initial[group][1].to(device, copy=True) for group in layouts}
        self._gradients = {group: torch.zeros(layout.pushed, device=device) for group, layout in layouts.items()}
        for group, layout in layouts.items():
            bind(model.network, layout, self._values[group], self._counters[group], self._gradients[group])
        for norm in training_norms(model.network).values():
            norm.momentum = 1.0

    def compute(self) -> tuple[Push, dict[str, Tensor]]:
        """Forward and backward on the next `accumulate` batches: loss, gradients and batch statistics are their means.

        Returns:
            The push for the server, and the private groups' pushes (layout.pushed,) to apply when it is answered.
        Raises:
            TrainingError: the loss, or the gradient's norm where it is clipped, is not finite.
        """
        start = time.perf_counter()
        for gradient in self._gradients.values():
            gradient.zero_()
        loss, images, skipped = 0.0, 0, 0
        bad_images: tuple[str, ...] = ()
        for _ in range(self._accumulate):
            batch = next(self._batches)
            loss += self._add_gradients(batch)
            images += len(batch.labels)
            skipped += batch.skipped
            bad_images += batch.bad_images
        if self._clip_norm is not None:
            self._clip(self._clip_norm)
        push = Push(
            worker=self.name,
            step=self._step,
            version=self._version,
            gradients={
                group: gradient.cpu().numpy().copy()
                for group, gradient in self._gradients.items()
                if group not in self._private and gradient.numel()
            },
            loss=loss,
            images=images,
            seconds=time.perf_counter() - start,
            skipped=skipped,
            bad_images=bad_images,
        )
        self._step += 1
        return push, {group: self._gradients[group].cpu().clone() for group in self._private}

    def _add_gradients(self, batch: Batch) -> float:
        """Forward and backward on one batch; returns its share of the step's loss, as its gradients are shares."""
        images = batch.images(self._device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self._device.type, self._precision, enabled=self._precision != torch.float32):
            loss = self._loss(self.model(images), batch.labels.to(self._device)) / self._accumulate
        loss.backward()
        loss_value = loss.item()
        if not math.isfinite(loss_value):
            raise TrainingError(
                f"Worker '{self.name}' (task '{self.task}'): the loss is {loss_value} at step {self._step}. "
                "Lower optimizer.rate, or look at the task's images and labels."
            )
        for group, layout in self._layouts.items():
            # The forward pass left this batch's own statistics here; the next one writes over them.
            statistics = layout.section(self._values[group], Role.STATISTIC)
            layout.section(self._gradients[group], Role.STATISTIC).add_(statistics, alpha=1 / self._accumulate)
        return loss_value

    def _clip(self, clip_norm: float) -> None:
        """Shorten the step's gradient; the statistics that lie behind it in the same buffers stay as they are."""
        norm = clip_grad_norm_(self.model.network.parameters(), clip_norm).item()
        if not math.isfinite(norm):
            raise TrainingError(
                f"Worker '{self.name}' (task '{self.task}'): the gradient's norm is {norm} at step {self._step}, which "
                "clip_norm cannot shorten. Lower optimizer.rate, or look at the task's images and labels."
            )

    def absorb(self, reply: Reply, private_pushes: Mapping[str, Tensor]) -> dict[int, dict[str, GroupValues]]:
        """Apply the private part of an answered push and take over the newest shared values.

        Returns:
            Versions put aside since the last reply -> the private tensors as of this worker's last push up to them.
        """
        new = [version for version in reply.pending if version not in self._seen]
        self._seen.update(new)
        due = {version: self._private_state() for version in new if version < reply.applied_version}
        for group, push in private_pushes.items():
            self._private[group].apply(push, reply.rate)
        self.receive(reply)
        return due | {version: self._private_state() for version in new if version >= reply.applied_version}

    def receive(self, reply: Reply) -> None:
        """Take over the newest values of all groups."""
        self._version = reply.version
        self._load(reply.groups | self._private_state())

    def evaluate(
        self, server_groups: Mapping[str, GroupValues], private: Mapping[str, GroupValues]
    ) -> dict[str, float]:
        """Validation metrics (top1 and top5 in percent, loss) of one version; restores the worker's values."""
        assert self.validation is not None
        kept = {group: (self._values[group].clone(), self._counters[group].clone()) for group in self._layouts}
        self._load({**server_groups, **private})
        metrics = evaluate(self.model, self.validation(), self._device)
        self.model.train()
        for group, (values, counters) in kept.items():
            self._values[group].copy_(values)
            self._counters[group].copy_(counters)
        return metrics

    def complete(self, server: Server) -> None:
        """After the last step of all workers: take over the final values and hand in what waits for evaluation."""
        self.receive(server.call("pull", self.name))
        if self.validation is not None:
            for version in server.call("pending", self.task):
                hand_in(self, server, version, self._private_state())

    def _private_state(self) -> dict[str, GroupValues]:
        return {name: group.state() for name, group in self._private.items()}

    def _load(self, groups: Mapping[str, GroupValues]) -> None:
        for name, state in groups.items():
            self._values[name][: self._layouts[name].pushed].copy_(as_tensor(state.values))
            self._counters[name].copy_(as_tensor(state.counters))


def hand_in(worker: TaskWorker, server: Server, version: int, private: dict[str, GroupValues]) -> None:
    """Evaluate a version that was put aside and give the server the metrics and the private tensors."""
    metrics = worker.evaluate(server.call("snapshot", version, worker.task), private)
    server.call("hand_in", version, worker.task, metrics, private)


def train_steps(worker: TaskWorker, server: Server, steps: int, in_flight: int) -> Iterator[None]:
    """The training loop of one worker; yields after each step, so that engine `local` can take turns.

    Args:
        steps: this worker's number of steps.
        in_flight: pushes that may be unanswered while the next gradient is computed; 0 waits for every answer.
    """
    waiting: deque[tuple[Any, dict[str, Tensor]]] = deque()

    def absorb_oldest() -> None:
        handle, private_pushes = waiting.popleft()
        due = worker.absorb(server.wait(handle), private_pushes)
        if worker.validation is not None:
            for version, private in due.items():
                hand_in(worker, server, version, private)

    worker.receive(server.call("pull", worker.name))
    for _ in range(steps):
        push, private_pushes = worker.compute()
        waiting.append((server.push(push), private_pushes))
        if len(waiting) > in_flight:
            absorb_oldest()
        yield
    while waiting:
        absorb_oldest()
    server.call("finish", worker.name)
