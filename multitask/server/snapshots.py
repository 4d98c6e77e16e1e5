"""Snapshots: versions that the server keeps while the workers report what belongs to them.

A snapshot is the values of one version. The shards keep the values of the groups on the server. The workers hold the
rest, the private tensors of each task with one worker, and have to report it. This module keeps the books: what is
asked, what was reported, and what is complete.

Why and when a snapshot is taken. A version is evaluated, or saved as a checkpoint, or both.
- Evaluation: after every `evaluate_every_rounds` rounds, and when the last worker has made its last step.
- Checkpoint: after every `save_every_rounds` rounds, after `save_every_s` seconds, and when all workers have paused.
  No new checkpoint falls due while an earlier one still waits for reports.
A version is taken at most once for each of the two reasons.

Who is asked what. A `SnapshotRequest` lies in every reply to a worker until the worker has reported. A worker that has
made its last step asks for it by `snapshot_requests`.
- Evaluation: the first worker of each task reports the task's validation metrics at that version.
- Checkpoint: every worker reports how many steps it has learned from, and its private tensors with their optimiser.
With both reports the worker sends its private tensors as they were after its last push up to that version.

When a snapshot is complete. All tasks have reported their metrics, if an evaluation was asked for, and all workers have
reported their state, if a checkpoint was asked for. `ParameterServer.drain` then hands it to the driver, once.

Who drops a snapshot. The driver reads the values from the shards and calls `ParameterServer.drop_snapshot`. The shards
keep the values if the same version was taken for the second reason in the meantime.

Why a request names the server's process. A server that was lost comes back at its last checkpoint and reaches the same
version numbers again, with other values. `SnapshotRequest.server_incarnation` tells the two apart: the worker sees a
new request, and the server ignores a report about a snapshot of the process before it.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from multitask.server.messages import Evaluation, GroupValues, SnapshotRequest, mean_top1
from multitask.server.progress import Progress
from multitask.server.rules import Rules


@dataclass(frozen=True)
class CompleteSnapshot:
    """Everything that the workers reported about a version. The shards keep its other values until it is dropped."""

    progress: Progress
    """The run's counters at that version."""
    evaluation: Evaluation | None
    """Metrics of all tasks, with the private groups that workers hold; None if no evaluation was asked for."""
    saved: dict[str, GroupValues] | None
    """Private groups that workers hold, with the optimiser's slots; None if no checkpoint was asked for."""


@dataclass
class PendingSnapshot:
    """A snapshot that waits for reports, with the reports that have arrived."""

    request: SnapshotRequest
    progress: Progress
    """Copy of the run's counters at that version."""
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """Task -> its validation metrics."""
    evaluated: dict[str, GroupValues] = field(default_factory=dict)
    """Private groups that were reported with the metrics."""
    savers: set[str] = field(default_factory=set)
    """Workers that have reported their state."""
    saved: dict[str, GroupValues] = field(default_factory=dict)
    """Private groups that were reported with the workers' states."""

    def is_complete(self, tasks: Collection[str], workers: Collection[str]) -> bool:
        """Return whether all tasks and workers have reported what was asked of them."""
        evaluated = not self.request.evaluate or self.metrics.keys() >= set(tasks)
        saved = not self.request.save or self.savers >= set(workers)
        return evaluated and saved


class Snapshots:
    """The books of all snapshots of one server; it holds no values of the groups on the server."""

    def __init__(
        self,
        tasks: Collection[str],
        workers: Mapping[str, str],
        rules: Rules,
        progress: Progress,
        server_incarnation: int,
        now: float,
    ) -> None:
        """Args:
        workers: worker -> its task; the first worker of a task evaluates it.
        progress: the server's own counters, not a copy. `take` reads them; a complete evaluation updates `best_top1`.
        server_incarnation: number of the server's process, for the requests.
        now: the present time in seconds, from any clock that never runs backwards.
        """
        self._tasks = set(tasks)
        self._workers = dict(workers)
        self._evaluators = {task: worker for worker, task in reversed(self._workers.items())}
        """Task -> its first worker."""
        self._rules = rules
        self._progress = progress
        self._server_incarnation = server_incarnation
        self._pending: dict[int, PendingSnapshot] = {}
        self._complete: dict[int, CompleteSnapshot] = {}
        self.evaluated_version = -1
        """Newest version that was taken for an evaluation; -1 before the first one."""
        self.saved_version = -1
        """Newest version that was taken for a checkpoint; -1 before the first one."""
        self._saved_at = now

    @property
    def pending(self) -> bool:
        """True while a snapshot waits for a report."""
        return bool(self._pending)

    def needs(self, version: int) -> bool:
        """Return whether a version's values are needed: a report is missing, or `drain` has yet to hand it out."""
        return version in self._pending or version in self._complete

    def due(self, rounds_before: Fraction, now: float) -> tuple[bool, bool]:
        """Return whether an evaluation is due, and whether a checkpoint is due.

        Args:
            rounds_before: rounds done before the latest steps were counted.
            now: the present time in seconds.
        """
        rules, rounds = self._rules, self._progress.rounds

        def passed(every: int | None) -> bool:
            return bool(every and rounds // every > rounds_before // every)

        by_time = rules.save_every_s is not None and now - self._saved_at > rules.save_every_s
        waits = any(pending.request.save for pending in self._pending.values())
        return passed(rules.evaluate_every_rounds), (passed(rules.save_every_rounds) or by_time) and not waits

    def take(self, *, evaluate: bool, save: bool, now: float) -> SnapshotRequest | None:
        """Note a snapshot of the present version.

        Args:
            now: the present time in seconds.
        Returns:
            What is newly asked about the version; None where the version was taken for the same reasons before.
        """
        version = self._progress.version
        evaluate = evaluate and version > self.evaluated_version
        save = save and version > self.saved_version
        if not (evaluate or save):
            return None
        if evaluate:
            self.evaluated_version = version
        if save:
            self.saved_version, self._saved_at = version, now
        request = SnapshotRequest(version, evaluate, save, server_incarnation=self._server_incarnation)
        pending = self._pending.get(version)
        if pending is None:
            self._pending[version] = PendingSnapshot(request, self._progress.copy())
        else:
            earlier = pending.request
            pending.request = replace(earlier, evaluate=evaluate or earlier.evaluate, save=save or earlier.save)
        return request

    def requests(self, worker: str, steps: int | None = None) -> tuple[SnapshotRequest, ...]:
        """Return the requests that wait for a report of this worker, oldest version first.

        Args:
            steps: leave out the versions that contain more steps of this worker; None for all versions. The worker has
                no answer to these steps yet, so its private tensors have not learned from them.
        """
        task = self._workers[worker]
        return tuple(
            replace(pending.request, steps=contained)
            for _, pending in sorted(self._pending.items())
            if (contained := pending.progress.workers[worker].step) <= (math.inf if steps is None else steps)
            and self._lacks(pending, worker, task)
        )

    def _lacks(self, pending: PendingSnapshot, worker: str, task: str) -> bool:
        return (pending.request.evaluate and worker == self._evaluators[task] and task not in pending.metrics) or (
            pending.request.save and worker not in pending.savers
        )

    def report_evaluation(
        self, request: SnapshotRequest, task: str, metrics: dict[str, float], private: dict[str, GroupValues]
    ) -> None:
        """Take in a task's metrics; see `ParameterServer.report_evaluation`."""
        pending = self._pending_of(request)
        if pending is not None:
            pending.metrics[task] = metrics
            pending.evaluated |= private
            self._hand_out_if_complete(pending)

    def report_state(
        self, request: SnapshotRequest, worker: str, step: int, position: int, private: dict[str, GroupValues]
    ) -> None:
        """Take in a worker's state; see `ParameterServer.report_state`."""
        pending = self._pending_of(request)
        if pending is not None:
            progress = pending.progress.workers[worker]
            progress.private_step, progress.private_position = step, position
            pending.savers.add(worker)
            pending.saved |= private
            self._hand_out_if_complete(pending)

    def drain(self) -> dict[int, CompleteSnapshot]:
        """Return the snapshots that were completed since the last call, by version."""
        complete, self._complete = self._complete, {}
        return complete

    def _pending_of(self, request: SnapshotRequest) -> PendingSnapshot | None:
        """Return the snapshot that a report belongs to.

        None where the snapshot is complete already, or where the request came from an earlier process of the server.
        """
        pending = self._pending.get(request.version)
        if pending is None or pending.request.server_incarnation != request.server_incarnation:
            return None
        return pending

    def _hand_out_if_complete(self, pending: PendingSnapshot) -> None:
        """Keep a snapshot for `drain` when all its reports have arrived."""
        if not pending.is_complete(self._tasks, self._workers):
            return
        request = pending.request
        del self._pending[request.version]
        evaluation = self._evaluation(pending) if request.evaluate else None
        # `drain` may not yet have handed out the same version, completed for the other reason.
        earlier = self._complete.get(request.version, CompleteSnapshot(pending.progress, None, None))
        # Saved private tensors keep the counters of their own report, which say how many steps they learned from.
        progress, saved = (pending.progress, pending.saved) if request.save else (earlier.progress, earlier.saved)
        progress.best_top1 = self._progress.best_top1
        self._complete[request.version] = CompleteSnapshot(progress, evaluation or earlier.evaluation, saved)

    def _evaluation(self, pending: PendingSnapshot) -> Evaluation:
        """Return a version's evaluation, and update the best mean top-1 of the run."""
        mean = mean_top1(pending.metrics.values())
        best = mean > self._progress.best_top1
        self._progress.best_top1 = max(mean, self._progress.best_top1)
        request, rounds = pending.request, math.floor(pending.progress.rounds)
        return Evaluation(request.version, rounds, pending.metrics, best, pending.evaluated, request.server_incarnation)
