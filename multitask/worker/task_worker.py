"""What one worker of a task does in a step."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from multitask.errors import TrainingError
from multitask.server.group import ParameterGroup
from multitask.server.messages import Gradients, Push, Reply, SnapshotRequest, evaluated
from multitask.worker.gradients import problem_of
from multitask.worker.learner import Learner
from multitask.worker.server import Server, Values
from multitask.worker.snapshots import NewRequests, SnapshotPart

REJECTED_IN_A_ROW = 5
"""The run ends when the server rejects this many pushes of one worker in a row."""


@dataclass(frozen=True)
class WorkerStart:
    """Where a worker's process begins."""

    step: int
    """Steps that the private tensors have learned from."""
    position: int
    """Position of the data stream after these steps."""
    incarnation: int
    """Number of earlier processes that this worker has had in the run."""
    process: int = field(default_factory=os.getpid)
    """Id of the worker's process."""


class TaskWorker:
    """One worker: its steps, its private tensors and its answers to snapshot requests.

    A `Learner` computes the gradients of the steps.
    """

    def __init__(
        self, name: str, task: str, learner: Learner, private: Mapping[str, ParameterGroup], start: WorkerStart
    ) -> None:
        """Args:
        name: unique in the run, for example "fashion/0".
        learner: its values are the start values of all groups, and its training stream begins at the position in
            `start`.
        private: the groups that stay with this worker, kept on the CPU.
        """
        self.name = name
        self.task = task
        self.learner = learner
        self.private = dict(private)
        """Group -> values and optimiser of the private tensors that this worker holds."""
        self.step, self.position = start.step, start.position
        """Steps that were computed, and the position of the data stream after the last one."""
        self.before_last_backward: Callable[[], None] = lambda: None
        """Called in each step before the backward pass that completes its gradients; never where they are clipped."""
        self._learned_step, self._learned_position = start.step, start.position
        """Steps that the private tensors have learned from, and the position of the data stream after them."""
        self._incarnation, self._process = start.incarnation, start.process
        self._version = 0
        self._rejected_in_a_row = 0
        self._requests = NewRequests(learner.evaluates)

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        """Group -> the step's gradients, then its batch statistics: shape (layout.pushed,), always the same buffers."""
        return self.learner.gradients

    def compute(self) -> tuple[Push, Gradients, dict[str, Tensor]]:
        """Compute one step: loss, gradients and batch statistics are means over its batches.

        Returns:
            The push for the server and its gradients, and for each private group what to apply when the push is
            answered, shape (layout.pushed,).
        Raises:
            TrainingError: the loss is not finite.
        """
        found = self.learner.compute(self.step, self.before_last_backward)
        # The server checks what it is sent. The worker checks everything, because the answer may get lost, and then the
        # private tensors must not learn from a step that the server rejected.
        problem = found.problem or problem_of(self.gradients)
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
            pid=self._process,
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
        self.learner.keep_features()

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
        earlier = [request for request in reply.requests if request.steps <= push.step]
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
        self.learner.load(values)
        self.learner.load({name: [group.view()] for name, group in self.private.items()})

    def report(self, server: Server, part: SnapshotPart) -> None:
        """Answer a snapshot request: first the private tensors, because evaluating takes long."""
        if part.request.save:
            server.report_state(part.request, self.name, part.step, part.position, part.private)
        values = server.snapshot(part.request.version, self.name) if part.request.evaluate else None
        if values is not None:
            private = {name: evaluated(group) for name, group in part.private.items()}
            served = {name: [evaluated(group) for group in parts] for name, parts in values.items()}
            metrics = self.learner.evaluate(served, private, lambda: server.report_alive(self.name))
            server.report_evaluation(part.request, self.task, metrics, private)

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
