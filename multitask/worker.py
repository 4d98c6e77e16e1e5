"""What one worker of a task does, step by step."""

import contextlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from multitask.data import Batch
from multitask.data.feature_cache import FeatureCache
from multitask.errors import TrainingError
from multitask.evaluation import evaluate
from multitask.server.group import ParameterGroup
from multitask.server.layout import Layout, Role, bind, training_norms
from multitask.server.messages import Gradients, GroupValues, Push, Reply, SnapshotRequest, as_tensor, is_finite
from patches import PatchedModel

REJECTED_IN_A_ROW = 5
"""Pushes that a worker may lose one after another before the run ends."""
ALIVE_S = 10.0
ONE_AT_A_TIME = threading.Lock()
"""Held by the worker that computes, of several in one process: torch's random numbers are the process's own."""


Values = Mapping[str, Sequence[GroupValues]]
"""Group -> its values, a range for each shard of the server."""


class Server(Protocol):
    """How a worker reaches the parameter server: `multitask.engines` has one for each side of a process border."""

    def pull(self, worker: str) -> tuple[Reply, Values]:
        """The newest values for a worker whose pushes are all answered."""

    def push(self, push: Push, gradients: Gradients) -> Any:
        """Send a push; `wait` turns what this returns into the reply and the newest values."""

    def wait(self, handle: Any) -> tuple[Reply, Values]:
        """Wait for the answer to a push."""

    def snapshot(self, version: int, worker: str) -> Values | None:
        """A snapshot's groups that the worker's task uses; None where the server no longer has the snapshot."""

    def snapshot_requests(self, worker: str) -> tuple[SnapshotRequest, ...]:
        """What the server asks this worker to report, the oldest snapshot first."""

    def report_state(
        self, request: SnapshotRequest, worker: str, step: int, position: int, private: dict[str, GroupValues]
    ) -> None:
        """As `ParameterServer.report_state`."""

    def report_evaluation(
        self, request: SnapshotRequest, task: str, metrics: dict[str, float], private: dict[str, GroupValues]
    ) -> None:
        """As `ParameterServer.report_evaluation`."""

    def report_alive(self, worker: str) -> None:
        """Tell the server that this worker is busy and not lost."""

    def finish(self, worker: str) -> None:
        """Tell the server that this worker has made its last step."""


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
        seed: int,
        cache: FeatureCache | None = None,
        step: int = 0,
        position: int = 0,
        incarnation: int = 0,
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
        seed: what dropout and stochastic depth draw in a step follows from this, the worker's name and the step.
        cache: where to keep what the frozen backbone gives for images that come without it.
        step: steps that the private tensors have learned from.
        position: where the batches begin.
        incarnation: counts the processes that this worker has had in this run.
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
        self._seed = seed
        self._cache = cache
        self.step, self.position = step, position
        """Steps made, and where the stream stood after the last one."""
        self._learned_step, self._learned_position = step, position
        self._incarnation = incarnation
        self.before_last_backward: Callable[[], None] = lambda: None
        """Called in each step before the backward pass after which its gradients are final, if none is clipped."""
        self._version = 0
        self._seen: set[tuple[int, int, str]] = set()
        self._rejected_in_a_row = 0
        self._values = {group: initial[group][0].to(device, copy=True) for group in layouts}
        self._counters = {group: initial[group][1].to(device, copy=True) for group in layouts}
        self._gradients = {group: torch.zeros(layout.pushed, device=device) for group, layout in layouts.items()}
        for group, layout in layouts.items():
            bind(model.network, layout, self._values[group], self._counters[group], self._gradients[group])
        for norm in training_norms(model.network).values():
            norm.momentum = 1.0

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        """Group -> the step's gradients, then its statistics: flat, shape (layout.pushed,), the same buffer always."""
        return self._gradients

    def compute(self) -> tuple[Push, Gradients, dict[str, Tensor]]:
        """Forward and backward on the next `accumulate` batches: loss, gradients and batch statistics are their means.

        Returns:
            The push for the server with its gradients, and the private groups' pushes (layout.pushed,) to apply when
            it is answered.
        Raises:
            TrainingError: the loss is not finite.
        """
        loss, images, skipped = 0.0, 0, 0
        bad_images: tuple[str, ...] = ()
        with ONE_AT_A_TIME, self._own_random_numbers():
            start = time.perf_counter()
            for gradient in self._gradients.values():
                gradient.zero_()
            for number in range(self._accumulate):
                batch = next(self._batches)
                if number == self._accumulate - 1 and self._clip_norm is None:  # clipping changes them all once more
                    self.before_last_backward()
                loss += self._add_gradients(batch)
                images += len(batch.labels)
                skipped += batch.skipped
                bad_images += batch.bad_images
        problem = self._private_problem()
        if self._clip_norm is not None:
            # The statistics that lie behind the gradients in the same buffers stay as they are.
            norm = clip_grad_norm_(self.model.network.parameters(), self._clip_norm).item()
            problem = problem if math.isfinite(norm) else f"its gradient's norm is {norm}, which cannot be clipped"
        push = Push(
            worker=self.name,
            step=self.step,
            version=self._version,
            loss=loss,
            images=images,
            seconds=time.perf_counter() - start,
            position=batch.position,
            incarnation=self._incarnation,
            skipped=skipped,
            bad_images=bad_images,
            pid=os.getpid(),
            problem=problem,
        )
        self.step, self.position = self.step + 1, batch.position
        gradients = {
            group: gradient.cpu().numpy()
            for group, gradient in self._gradients.items()
            if group not in self._private and gradient.numel()
        }
        return push, gradients, {group: self._gradients[group].to("cpu", copy=True) for group in self._private}

    @contextlib.contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Random numbers that are this step's whoever makes it: in which process, after which steps, for what time."""
        entropy = np.random.SeedSequence([self._seed, self.step, *self.name.encode()])
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
            yield

    def _add_gradients(self, batch: Batch) -> float:
        """Forward and backward on one batch; returns its share of the step's loss, as its gradients are shares."""
        with torch.autocast(self._device.type, self._precision, enabled=self._precision != torch.float32):
            loss = self._loss(self._outputs(batch), batch.labels.to(self._device)) / self._accumulate
        loss.backward()
        loss_value = loss.item()
        if not math.isfinite(loss_value):
            raise TrainingError(
                f"the loss is {loss_value} at step {self.step}. Lower optimizer.rate, or look at the task's images and "
                "labels."
            )
        for group, layout in self._layouts.items():
            # The forward pass left this batch's own statistics here; the next one writes over them.
            statistics = layout.section(self._values[group], Role.STATISTIC)
            layout.section(self._gradients[group], Role.STATISTIC).add_(statistics, alpha=1 / self._accumulate)
        return loss_value

    def _outputs(self, batch: Batch) -> Any:
        """What the model gives for a batch: the shared part is computed, and kept, only where it is not stored."""
        images = None
        if batch.pixels is not None:
            images = batch.images(self._device).contiguous(memory_format=torch.channels_last)
        if batch.features is not None:
            shared = {step: feature.to(self._device) for step, feature in batch.features.items()}
        elif self._cache is None:
            return self.model(images)
        else:
            assert images is not None
            assert batch.rows is not None
            shared = self.model.shared_part(images)
            self._cache.add(batch.rows, batch.labels.numpy(), shared)
        return self.model.own_part(images, shared)

    def keep_features(self) -> None:
        """Store what was computed of the shared part, which waits for more of it."""
        if self._cache is not None:
            self._cache.flush()

    def _private_problem(self) -> str | None:
        """What is wrong with the gradients that the server does not see."""
        bad = [group for group in self._private if not is_finite(self._gradients[group])]
        return f"it holds a gradient that is not finite in group '{bad[0]}'" if bad else None

    def absorb(
        self, push: Push, private_pushes: Mapping[str, Tensor], reply: Reply, values: Values
    ) -> list["SnapshotPart"]:
        """Apply the private part of an answered push and take over the newest values.

        Returns:
            For each version put aside since the last reply: what this worker held as of its last push up to it.
        Raises:
            TrainingError: the server rejected several pushes in a row.
        """
        due = [
            self._part_of(request)
            for request in self._new(reply.requests, lambda request: request.version < reply.applied_version)
        ]
        # A step made again, and one whose answer was lost, nobody refuses once more.
        rejected = reply.rejected or push.problem
        if rejected is None:
            self._rejected_in_a_row = 0
            for group, gradient in private_pushes.items():
                self._private[group].apply(gradient, reply.rate)
        else:
            self._rejected_in_a_row += 1
            if self._rejected_in_a_row == REJECTED_IN_A_ROW:
                raise TrainingError(f"{rejected} It was rejected push number {REJECTED_IN_A_ROW} in a row.")
        self._learned_step, self._learned_position = push.step + 1, push.position
        self.receive(reply, values)
        return due + [self._part_of(request) for request in self._new(reply.requests)]

    def receive(self, reply: Reply, values: Values) -> None:
        """Take over the newest values of all groups."""
        self._version = reply.version
        self._load(values)
        self._load({name: [group.view()] for name, group in self._private.items()})

    def evaluate(
        self, values: Values, private: Mapping[str, GroupValues], alive: Callable[[], None]
    ) -> dict[str, float]:
        """Validation metrics (top1 and top5 in percent, loss) of one version; restores the worker's values.

        Args:
            values: of the groups on the server.
            private: of the groups that this worker holds.
            alive: called now and then.
        """
        assert self.validation is not None
        kept = {group: (self._values[group].clone(), self._counters[group].clone()) for group in self._layouts}
        self._load(values)
        self._load({name: [group] for name, group in private.items()})
        metrics = evaluate(self.model, _now_and_then(alive, self.validation()), self._device)
        self.model.train()
        for group, (whole, counters) in kept.items():
            self._values[group].copy_(whole)
            self._counters[group].copy_(counters)
        return metrics

    def answer_last_requests(self, server: Server) -> None:
        """After the last step of all workers: take over the final values and hand in what is still asked for."""
        self.receive(*server.pull(self.name))
        self.answer_requests(server)

    def answer_requests(self, server: Server) -> None:
        """After the own last step: hand in what is asked for, while others may still train."""
        for request in self._new(server.snapshot_requests(self.name)):
            give(self, server, self._part_of(request))

    def _new(
        self, requests: Iterable[SnapshotRequest], when: Callable[[SnapshotRequest], bool] = lambda _: True
    ) -> list[SnapshotRequest]:
        """What is asked of this worker for the first time."""
        new = []
        for request in filter(when, requests):
            which = request.server_incarnation, request.version
            evaluate = request.evaluate and self.validation is not None and (*which, "evaluate") not in self._seen
            save = request.save and (*which, "save") not in self._seen
            self._seen |= {(*which, "evaluate")} if evaluate else set()
            self._seen |= {(*which, "save")} if save else set()
            if evaluate or save:
                new.append(replace(request, evaluate=evaluate, save=save))
        return new

    def _part_of(self, request: SnapshotRequest) -> "SnapshotPart":
        private = {name: group.state(request.save) for name, group in self._private.items()}
        return SnapshotPart(request, self._learned_step, self._learned_position, private)

    def _load(self, values: Values) -> None:
        for name, parts in values.items():
            start = 0
            for part in parts:
                self._values[name][start : start + part.values.size].copy_(as_tensor(part.values))
                start += part.values.size
            self._counters[name].copy_(as_tensor(parts[0].counters))


@dataclass(frozen=True)
class SnapshotPart:
    """What a worker held as of its last push up to a version that was put aside."""

    request: SnapshotRequest
    step: int
    position: int
    private: dict[str, GroupValues]


def give(worker: TaskWorker, server: Server, held: SnapshotPart) -> None:
    """Give the server what it asked for: the private tensors first, since evaluating takes long."""
    if held.request.save:
        server.report_state(held.request, worker.name, held.step, held.position, held.private)
    values = server.snapshot(held.request.version, worker.name) if held.request.evaluate else None
    if values is not None:
        private = {name: GroupValues(group.values, group.counters) for name, group in held.private.items()}
        metrics = worker.evaluate(values, private, lambda: server.report_alive(worker.name))
        server.report_evaluation(held.request, worker.task, metrics, private)


def train_steps(worker: TaskWorker, server: Server, steps: int, in_flight: int) -> Iterator[None]:
    """The training loop of one worker; yields after each push, so that engine `local` can take turns.

    Args:
        steps: the step at which this worker has finished.
        in_flight: pushes that may be unanswered while the next gradient is computed; 0 waits for every answer.
    """
    waiting: deque[tuple[Any, Push, dict[str, Tensor]]] = deque()

    def absorb_oldest() -> bool:
        handle, push, private_pushes = waiting.popleft()
        reply, values = server.wait(handle)
        for held in worker.absorb(push, private_pushes, reply, values):
            give(worker, server, held)
        return reply.pause

    first, values = server.pull(worker.name)
    worker.receive(first, values)
    pause = first.pause
    while worker.step < steps and not pause:
        push, gradients, private_pushes = worker.compute()
        waiting.append((server.push(push, gradients), push, private_pushes))
        yield
        if len(waiting) > in_flight:
            pause = absorb_oldest()
    while waiting:
        pause = absorb_oldest()
    worker.keep_features()
    if worker.step == steps:
        server.finish(worker.name)


def _now_and_then(call: Callable[[], None], batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches, with a call between two of them every few seconds."""
    called = time.monotonic()
    for batch in batches:
        if time.monotonic() - called > ALIVE_S:
            called = time.monotonic()
            call()
        yield batch
