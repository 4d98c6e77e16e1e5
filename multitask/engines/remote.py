"""The parameter server as a worker in another process sees it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from multitask.cluster.interface import Actor, Cluster, Ref
from multitask.engines.loss import LOST, Answer, RestartAllError
from multitask.job.job import Job
from multitask.server.messages import Gradients, GroupValues, OutOfStepError, Push, Reply, SnapshotRequest
from multitask.worker import Values

RETRY_S = 0.2
"""Seconds between two tries to reach a server that is lost."""


class RemoteServer:
    """The server as a worker in another process sees it (`multitask.worker.Server`).

    Under `async` and `bounded` it goes on when the server's process is lost and started again. Where the pushes of a
    round make one update, no worker can go on without the others: every call that is lost raises RestartAllError.
    """

    def __init__(
        self, cluster: Cluster, job: Job, worker: str, incarnation: int, server: Actor, shards: Sequence[Actor]
    ) -> None:
        self._cluster = cluster
        self._server, self._shards = server, shards
        self._worker, self._incarnation = worker, incarnation
        self._names = [group.name for group in job.served() if job.workers[worker] in group.tasks]
        self._ranges = {group.name: group.layout.ranges(job.shards) for group in job.served()}
        self._goes_on = not job.spec.engine.together
        self._made: tuple[int, int] | None = None
        """Steps that this worker has pushed, answered or not, and the stream's position after them."""
        self._connection = 0
        """Number of times that the server was lost; what was sent before the last time is lost, too."""
        self._joined = 0
        """Value of `_connection` when this worker last joined: only this connection's server knows the worker."""

    def join(self, made: tuple[int, int] | None) -> Reply:
        """Make the worker known to the server.

        Args:
            made: steps that the worker's private tensors have learned from, and the stream's position after them; None
                for a worker that has just started and holds no private tensors.
        """
        step, position = made or (None, 0)
        reply = self._retry(
            lambda: self._cluster.get(self._server.join.remote(self._worker, self._incarnation, step, position))
        )
        self._made = made or (reply.step, reply.position)
        self._joined = self._connection
        return reply

    def pull(self, worker: str) -> tuple[Reply, Values]:
        return self._retry(lambda: self._values_of([self._server.pull.remote(worker)]))

    def push(self, push: Push, gradients: Gradients) -> tuple[int, list[Ref[Any]]]:
        if self._joined != self._connection:
            # The server went back to a version before the one that these gradients were computed on.
            push = replace(push, version=min(push.version, self.join(self._made).version))
        self._made = push.step + 1, push.position
        parts: list[Gradients] = [
            {name: gradient[slice(*self._ranges[name][number])] for name, gradient in gradients.items()}
            for number in range(1 + len(self._shards))
        ]
        parts = [{name: gradient for name, gradient in part.items() if gradient.size} for part in parts]
        problems = [
            shard.stash.remote(push.key, part, self._names) for shard, part in zip(self._shards, parts[1:], strict=True)
        ]
        return self._connection, [self._server.push.remote(push, parts[0], *problems)]

    def wait(self, handle: tuple[int, list[Ref[Any]]]) -> tuple[Reply, Values]:
        connection, answer = handle
        if connection == self._connection:
            try:
                return self._values_of(answer)
            except (*LOST, OutOfStepError) as error:  # a push sent before the loss may reach the restored server
                self._note_loss(error)
        # Pushes without an answer may have been applied before the loss or not; none of them is sent again.
        if self._joined != self._connection:
            self.join(self._made)
        return self.pull(self._worker)

    def snapshot(self, version: int, worker: str) -> Values | None:
        return self._retry(lambda: self._cluster.get(self._server.snapshot.remote(version, worker)))

    def snapshot_requests(self, worker: str) -> tuple[SnapshotRequest, ...]:
        requests: tuple[SnapshotRequest, ...] = self._call("snapshot_requests", worker)
        return requests

    def report_state(
        self, request: SnapshotRequest, worker: str, step: int, position: int, private: dict[str, GroupValues]
    ) -> None:
        self._call("report_state", request, worker, step, position, private)

    def report_evaluation(
        self, request: SnapshotRequest, task: str, metrics: dict[str, float], private: dict[str, GroupValues]
    ) -> None:
        self._call("report_evaluation", request, task, metrics, private)

    def report_alive(self, worker: str) -> None:
        self._call("report_alive", worker)

    def finish(self, worker: str, step: int) -> None:
        self._call("finish", worker, step)

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call a method of `ParameterServer` and wait for its answer."""
        return self._retry(lambda: self._cluster.get(self._server.call.remote(method, *arguments)))

    def _retry(self, ask: Callable[[], Answer]) -> Answer:
        """Ask until the server answers. The driver ends the run, and this process with it, if it does not come back."""
        while True:
            try:
                return ask()
            except LOST as error:
                self._note_loss(error)
                self._cluster.clock.sleep(RETRY_S)

    def _note_loss(self, error: Exception) -> None:
        """Note that a call was lost.

        Raises:
            RestartAllError: the worker cannot go on.
        """
        if not self._goes_on:
            raise RestartAllError(f"Worker '{self._worker}' could not reach the parameter server: {error}") from error
        self._connection += 1

    def _values_of(self, answer: list[Ref[Any]]) -> tuple[Reply, Values]:
        """Wait for an answer of the server, and fetch the values that it refers to.

        Args:
            answer: a list with the only reference to the answer; it is emptied.
        """
        reply, shards = self._cluster.fetch(answer)
        return reply, {name: [shard[name] for shard in shards] for name in shards[0]}
