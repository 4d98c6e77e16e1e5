"""What one worker of a task does in a step."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from multitask.data import Batch
from multitask.data.feature_cache import FeatureCache
from multitask.errors import TrainingError
from multitask.evaluation import evaluate
from multitask.server.group import ParameterGroup
from multitask.server.layout import Layout
from multitask.server.messages import Gradients, GroupValues, Push, Reply, SnapshotRequest
from multitask.worker.buffers import ModelBuffers
from multitask.worker.gradients import GradientComputer, StepSettings, problem_of
from multitask.worker.server import Server, Values
from multitask.worker.snapshots import NewRequests, SnapshotPart
from patches import PatchedModel

REJECTED_IN_A_ROW = 5
"""The run ends when the server rejects this many pushes of one worker in a row."""
ALIVE_S = 10.0
"""Seconds between two signs of life while a worker evaluates."""


@dataclass(frozen=True)
class WorkerStart:
    """Where a worker's process begins."""

    step: int
    """Steps that the private tensors have learned from."""
    position: int
    """Position of the data stream after these steps."""
    incarnation: int
    """Number of earlier processes that this worker has had in the run."""


class TaskWorker:
    """One worker's model, data and private tensors."""

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
        settings: StepSettings,
        validation: Callable[[], Iterable[Batch]] | None,
        cache: FeatureCache | None,
        start: WorkerStart,
    ) -> None:
        """Args:
        name: unique in the run, for example "fashion/0".
        layouts: group -> its layout, for all groups that the model holds.
        initial: group -> values (layout.size,) and counters (layout.counters,) at the start.
        private: the groups that stay with this worker, kept on the CPU.
        batches: the training stream, from the position in `start` on.
        validation: makes an iterator over the validation images; None for a worker that does not evaluate.
        cache: stores the features that the frozen backbone computes for images that have none yet.
        """
        self.name = name
        self.task = task
        self.model = model.train()
        self.validation = validation
        self.private = dict(private)
        """Group -> values and optimiser of the private tensors that this worker holds."""
        self.step, self.position = start.step, start.position
        """Steps that were computed, and the position of the data stream after the last one."""
        self.before_last_backward: Callable[[], None] = lambda: None
        """Called in each step before the backward pass that completes its gradients; never where they are clipped."""
        self._learned_step, self._learned_position = start.step, start.position
        """Steps that the private tensors have learned from, and the position of the data stream after them."""
        self._incarnation = start.incarnation
        self._version = 0
        self._rejected_in_a_row = 0
        self._requests = NewRequests(evaluates=validation is not None)
        self._device = settings.device
        self._buffers = ModelBuffers(model.network, layouts, initial, settings.device)
        self._computer = GradientComputer(name, self.model, self._buffers, batches, settings, cache)

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        """Group -> the step's gradients, then its batch statistics: shape (layout.pushed,), always the same buffers."""
        return self._buffers.gradients

    def compute(self) -> tuple[Push, Gradients, dict[str, Tensor]]:
        """Compute one step: loss, gradients and batch statistics are means over its batches.

        Returns:
            The push for the server and its gradients, and for each private group what to apply when the push is
            answered, shape (layout.pushed,).
        Raises:
            TrainingError: the loss is not finite.
        """
        found = self._computer.compute(self.step, self.before_last_backward)
        # The server never sees the private gradients, so the worker checks them itself.
        problem = found.problem or problem_of({group: self.gradients[group] for group in self.private})
        push = Push(
            worker=self.name,
            step=self.step,
            version=self._version,
            loss=found.loss,
            images=found.images,
            seconds=found.seconds,
            position=found.position,
            incarnation=self._incarnation,
            skipped=found.skipped,
            bad_images=found.bad_images,
            pid=os.getpid(),
            problem=problem,
        )
        self.step, self.position = self.step + 1, found.position
        pushed = {
            group: gradient.cpu().numpy()
            for group, gradient in self.gradients.items()
            if group not in self.private and gradient.numel()
        }
        return push, pushed, {group: self.gradients[group].to("cpu", copy=True) for group in self.private}

    def keep_features(self) -> None:
        """Write computed features of the frozen backbone that still wait in memory to the cache."""
        self._computer.keep_features()

    def absorb(
        self, push: Push, private_pushes: Mapping[str, Tensor], reply: Reply, values: Values
    ) -> list[SnapshotPart]:
        """Apply the private part of an answered push and take over the newest values.

        Returns:
            This worker's part of each snapshot that was requested since the last reply.
        Raises:
            TrainingError: the server rejected several pushes in a row.
        """
        # These snapshots were taken before the push was applied, so they need the private tensors from before it, too.
        earlier = [request for request in reply.requests if request.version < reply.applied_version]
        parts = [self._part_of(request) for request in self._requests.take(earlier)]
        # The reply does not repeat the push's own problem when the step was redone or its first answer was lost.
        rejected = reply.rejected or push.problem
        if rejected is None:
            self._rejected_in_a_row = 0
            for group, gradient in private_pushes.items():
                self.private[group].apply(gradient, reply.rate)
        else:
            self._rejected_in_a_row += 1
            if self._rejected_in_a_row == REJECTED_IN_A_ROW:
                raise TrainingError(f"{rejected} It was rejected push number {REJECTED_IN_A_ROW} in a row.")
        self._learned_step, self._learned_position = push.step + 1, push.position
        self.receive(reply, values)
        return parts + [self._part_of(request) for request in self._requests.take(reply.requests)]

    def receive(self, reply: Reply, values: Values) -> None:
        """Take over the newest values of all groups."""
        self._version = reply.version
        self._buffers.load(values)
        self._buffers.load({name: [group.view()] for name, group in self.private.items()})

    def report(self, server: Server, part: SnapshotPart) -> None:
        """Answer a snapshot request: first the private tensors, because evaluating takes long."""
        if part.request.save:
            server.report_state(part.request, self.name, part.step, part.position, part.private)
        values = server.snapshot(part.request.version, self.name) if part.request.evaluate else None
        if values is not None:
            private = {name: GroupValues(group.values, group.counters) for name, group in part.private.items()}
            metrics = self.evaluate(values, private, lambda: server.report_alive(self.name))
            server.report_evaluation(part.request, self.task, metrics, private)

    def evaluate(
        self, values: Values, private: Mapping[str, GroupValues], alive: Callable[[], None]
    ) -> dict[str, float]:
        """Return the validation metrics (top1 and top5 in percent, loss) of one version; restore the worker's values.

        Args:
            values: the groups on the server.
            private: the groups that this worker holds.
            alive: called every few seconds.
        """
        assert self.validation is not None
        with self._buffers.restored():
            self._buffers.load(values)
            self._buffers.load({name: [group] for name, group in private.items()})
            metrics = evaluate(self.model, _with_signs_of_life(alive, self.validation()), self._device)
            self.model.train()
        return metrics

    def answer_requests(self, server: Server) -> None:
        """Answer the open snapshot requests after this worker's last step; other workers may still train."""
        for request in self._requests.take(server.snapshot_requests(self.name)):
            self.report(server, self._part_of(request))

    def answer_last_requests(self, server: Server) -> None:
        """Take over the final values and answer the open snapshot requests, after the last step of all workers."""
        self.receive(*server.pull(self.name))
        self.answer_requests(server)

    def _part_of(self, request: SnapshotRequest) -> SnapshotPart:
        private = {name: group.state(request.save) for name, group in self.private.items()}
        return SnapshotPart(request, self._learned_step, self._learned_position, private)


def _with_signs_of_life(alive: Callable[[], None], batches: Iterable[Batch]) -> Iterator[Batch]:
    """Pass batches on, and call `alive` between two of them every few seconds."""
    called = time.monotonic()
    for batch in batches:
        if time.monotonic() - called > ALIVE_S:
            called = time.monotonic()
            alive()
        yield batch
