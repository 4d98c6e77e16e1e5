"""The parameter server as a worker calls it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from multitask.server.messages import Gradients, GroupValues, Push, Reply, SnapshotRequest

Values = Mapping[str, Sequence[GroupValues]]
"""Group -> its values: one range for each shard of the server, in order."""


class Server(Protocol):
    """The calls that a worker makes to the parameter server.

    `multitask.engines` has one implementation for a server in the same process, one for a server in another process,
    and one for the ranks of engine `allreduce`.
    """

    def pull(self, worker: str) -> tuple[Reply, Values]:
        """Return the newest values to a worker that has no unanswered push."""

    def push(self, push: Push, gradients: Gradients) -> Any:
        """Send a push and return a handle, which `wait` turns into the reply and the newest values."""

    def wait(self, handle: Any) -> tuple[Reply, Values]:
        """Wait for the answer to a push."""

    def snapshot(self, version: int, worker: str) -> Values | None:
        """Return a snapshot's groups that the worker's task uses; None if the server no longer has the snapshot."""

    def snapshot_requests(self, worker: str) -> tuple[SnapshotRequest, ...]:
        """Return the snapshot requests that this worker has not answered, the oldest snapshot first."""

    def report_state(
        self, request: SnapshotRequest, worker: str, step: int, position: int, private: dict[str, GroupValues]
    ) -> None:
        """Report the worker's part of a checkpoint; see `ParameterServer.report_state`."""

    def report_evaluation(
        self, request: SnapshotRequest, task: str, metrics: dict[str, float], private: dict[str, GroupValues]
    ) -> None:
        """Report the task's validation metrics of a snapshot; see `ParameterServer.report_evaluation`."""

    def report_alive(self, worker: str) -> None:
        """Tell the server that this worker is busy and has not died."""

    def finish(self, worker: str, step: int) -> None:
        """Tell the server that this worker has made its last step; see `ParameterServer.finish`."""
