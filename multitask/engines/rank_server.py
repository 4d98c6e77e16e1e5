"""Engine `allreduce`: the server as a rank sees it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from multitask.cluster.collectives import PeerLostError
from multitask.cluster.interface import Actor, Cluster, Ref
from multitask.engines.loss import LOST
from multitask.engines.operations import Apply, DropSnapshot, Operation, TakeSnapshot
from multitask.engines.reduction import Reduction
from multitask.job.job import Job
from multitask.server.messages import (
    Gradients,
    GroupValues,
    Push,
    PushRejectedError,
    Reply,
    SnapshotRequest,
    evaluated,
)
from multitask.server.shard import Update, shares
from multitask.worker import TaskWorker, Values


@dataclass(frozen=True)
class LedgerConnection:
    """The ledger as the ranks of one incarnation of the worker group call it."""

    cluster: Cluster
    actor: Actor
    incarnation: int

    def send(self, method: str, *arguments: Any) -> Ref[Any]:
        """Call a method of `LedgerActor`; `answer_of` returns its result."""
        return getattr(self.actor, method).remote(self.incarnation, *arguments)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of `LedgerActor` and wait for its result.

        Raises:
            PeerLostError: as from `answer_of`.
        """
        return answer_of(self.cluster, self.send(method, *arguments))


def answer_of(cluster: Cluster, call: Ref[Any]) -> Any:
    """Wait for an answer of the ledger.

    Raises:
        PeerLostError: the ledger is gone, or it serves a newer incarnation of the group.
    """
    try:
        return cluster.get(call)
    except (*LOST, PushRejectedError) as error:
        raise PeerLostError(f"The ledger was lost, or this worker group was: {error}") from error


def contribution(worker: str, contributors: Sequence[str], weights: Mapping[str, float]) -> float | None:
    """Return the factor of a worker's gradients in a weighted sum over contributors; None if it is not among them.

    Args:
        contributors: workers whose gradients are summed.
        weights: worker -> weight of its gradients in a mean.
    """
    if worker not in contributors:
        return None
    factors, _ = shares([weights[name] for name in contributors])
    return factors[contributors.index(worker)]


class RankServer:
    """The server of one rank: the ledger decides, and the rank itself holds the values and applies the updates.

    All ranks carry out the same operations in the same order on the groups that they hold, so their values stay equal
    bit for bit.

    The gradients of a step take this way:

    1. `_arm` runs before the last backward pass, which then starts each bucket when its gradients are final.
    2. `push` reports the step to the ledger and starts the remaining buckets.
    3. `wait` waits for the sums, and for the ledger's answer, which says how to apply them.
    4. `_apply` applies them to the groups that this rank holds.
    """

    def __init__(
        self,
        job: Job,
        worker: TaskWorker,
        ledger: LedgerConnection,
        reduction: Reduction,
        steps_left: Mapping[str, int],
        operations: Iterable[Operation],
    ) -> None:
        """Args:
        worker: the rank's worker; from now on it arms the reduction in each step.
        reduction: sums this worker's gradients with those of the others.
        steps_left: worker -> steps that it must still make, for all workers.
        operations: what the ledger wrote down before the worker joined.
        """
        self._worker, self._ledger, self._reduction = worker.name, ledger, reduction
        self._gradients = worker.gradients
        self._steps_left = dict(steps_left)
        self._weights = {name: job.task(task).weight for name, task in job.workers.items()}
        self.replica = job.make_replica(worker.name)
        """The groups that this rank holds, with their optimisers and snapshots."""
        self._users = {
            name: [user for user, task in job.workers.items() if task in job.groups[name].tasks]
            for name in self.replica.groups
        }
        """Group -> the workers that use it, for the groups that this rank holds."""
        self._owned = [name for name, users in self._users.items() if users[0] == worker.name]
        """Groups that this rank reports. All users of a group hold equal values, so one of them is enough."""
        worker.before_last_backward = self._arm
        self._follow(operations)

    def pull(self, worker: str) -> tuple[Reply, Values]:
        reply, operations = self._ledger.ask("pull", worker)
        self._follow(operations)
        return reply, self._values()

    def push(self, push: Push, gradients: Gradients) -> Ref[Any]:  # noqa: ARG002
        handle = self._ledger.send("push", push)
        if not self._reduction.armed:  # The worker clips its gradients, so none of them was final before.
            self._arm()
        self._reduction.flush()
        return handle

    def wait(self, handle: Ref[Any]) -> tuple[Reply, Values]:
        sums = self._reduction.finish()
        reply, operations = answer_of(self._ledger.cluster, handle)
        self._follow(operations, sums)
        return reply, self._values()

    def snapshot(self, version: int, worker: str) -> Values:  # noqa: ARG002
        return {name: [group] for name, group in self._snapshot_at(version).items()}

    def snapshot_requests(self, worker: str) -> tuple[SnapshotRequest, ...]:
        requests: tuple[SnapshotRequest, ...]
        requests, operations = self._ledger.ask("snapshot_requests", worker)
        self._follow(operations)
        return requests

    def report_state(
        self, request: SnapshotRequest, worker: str, step: int, position: int, private: dict[str, GroupValues]
    ) -> None:
        held = private | self._owned_at(request.version, slots=True)
        self._ledger.ask("report_state", request, worker, step, position, held)

    def report_evaluation(
        self, request: SnapshotRequest, task: str, metrics: dict[str, float], private: dict[str, GroupValues]
    ) -> None:
        held = private | self._owned_at(request.version, slots=False)
        self._ledger.ask("report_evaluation", request, task, metrics, held)

    def report_alive(self, worker: str) -> None:
        self._ledger.ask("report_alive", worker)

    def finish(self, worker: str, step: int) -> None:
        self._ledger.ask("finish", worker, step)

    def rest(self, worker: TaskWorker) -> None:
        """After this rank's last step: follow the other ranks and answer snapshot requests until all ranks rest."""
        ended = False
        while not ended:
            operations, ended = self._ledger.ask("rest", worker.name)
            self._follow(operations)
            worker.answer_requests(self)

    def _values(self) -> Values:
        return {name: [group.view()] for name, group in self.replica.groups.items()}

    def _snapshot_at(self, version: int) -> dict[str, GroupValues]:
        kept = self.replica.snapshot(version)
        assert kept is not None, "a snapshot request comes with the operations that take the snapshot"
        return kept

    def _owned_at(self, version: int, *, slots: bool) -> dict[str, GroupValues]:
        """Return the part of a snapshot that this rank reports, with or without the optimiser's slots."""
        kept = self._snapshot_at(version)
        groups = {name: kept[name] for name in self._owned}
        return groups if slots else {name: evaluated(group) for name, group in groups.items()}

    def _follow(self, operations: Iterable[Operation], sums: Mapping[str, Tensor] | None = None) -> None:
        """Carry out what the ledger has written down.

        Args:
            sums: group -> summed gradients of the round that the first `Apply` ends; None if this worker made no push
                in that round.
        """
        for operation in operations:
            match operation:
                case Apply(update):
                    self._apply(update, self._sums_without_a_push() if sums is None else sums)
                    sums = None
                case TakeSnapshot(version, slots):
                    self.replica.take_snapshot(version, slots)
                case DropSnapshot(version):
                    self.replica.drop_snapshot(version)

    def _arm(self) -> None:
        """Start the sums of this step's gradients. The factors assume that no push of the round is rejected; otherwise
        the sum is made again."""
        self._reduction.arm(
            {name: contribution(self._worker, self._expected(name), self._weights) for name in self._users}
        )

    def _sums_without_a_push(self) -> Mapping[str, Tensor]:
        """Take part in the sums of a round for which this worker has no gradients."""
        self._arm()
        return self._reduction.finish()

    def _apply(self, update: Update, sums: Mapping[str, Tensor]) -> None:
        """Apply a round's update to the groups that this rank holds."""
        for name, step in update.items():
            if name not in self._users:
                continue
            workers = [worker for worker, *_ in step.pushes]
            if name not in sums:  # No other worker uses this group.
                total = self._gradients[name]
            elif workers == self._expected(name):
                total = sums[name]
            else:
                # A push was rejected. Its gradients are in the sums, and may not be finite.
                total = self._reduction.again(name, contribution(self._worker, workers, self._weights))
            if name in sums:
                total.div_(shares(step.weights)[1])
            self.replica.groups[name].apply(total.cpu(), step.rate)
        for worker in self._steps_left:
            self._steps_left[worker] -= 1

    def _expected(self, name: str) -> list[str]:
        """Return the workers that push gradients of a group in this round."""
        return [worker for worker in self._users[name] if self._steps_left[worker] > 0]
