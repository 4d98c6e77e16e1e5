"""The parameter server: owns the shared tensors, applies pushes in order of arrival, sets the rate."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from multitask.server.group import ParameterGroup
from multitask.server.messages import (
    Evaluation,
    GroupValues,
    Push,
    PushRejectedError,
    Reply,
    Snapshot,
    StepRecord,
    as_tensor,
)
from multitask.server.schedules import Schedule


class ParameterServer:
    """A plain class; engine `async` makes it an actor, engine `local` calls it in one process.

    Source: Mudrakarta et al., "K for the Price of 1", ICLR 2019, section 5.3: independent, asynchronous updates of
    shared weights, each worker bound to one task. The paper keeps private weights on the server too; here they stay
    with their worker unless the task has several.
    """

    def __init__(
        self,
        groups: Mapping[str, ParameterGroup],
        uses: Mapping[str, Sequence[str]],
        workers: Mapping[str, str],
        schedule: Schedule,
        evaluate_every_rounds: int,
    ) -> None:
        """Args:
        groups: name -> the group's values and optimiser.
        uses: task -> names of the groups on the server that its model holds.
        workers: worker -> its task.
        schedule: rounds done -> rate.
        evaluate_every_rounds: how often a version is put aside for evaluation; the last one always is.
        """
        self._groups = dict(groups)
        self._uses = {task: tuple(names) for task, names in uses.items()}
        self._workers = dict(workers)
        self._schedule = schedule
        self._evaluate_every = evaluate_every_rounds
        self._version = 0
        self._rounds = Fraction(0)
        self._active = set(workers)
        self._next_step = dict.fromkeys(workers, 0)
        self._applied = dict.fromkeys(workers, (0, schedule(0)))
        self._snapshots: dict[int, Snapshot] = {}
        self._last_snapshot = -1
        self._best: tuple[float, Snapshot | None] = (-math.inf, None)
        self._latest: Snapshot | None = None
        self._records: list[StepRecord] = []
        self._evaluations: list[Evaluation] = []

    def pull(self, worker: str) -> Reply:
        """The newest values for a worker that has nothing in flight: at its start and at its end."""
        return self._reply(worker)

    def push(self, push: Push) -> Reply:
        """Apply one worker's gradients to the groups that its task uses, exactly once, and answer with the values.

        A push that was applied before (its step is the last one seen) changes nothing and is answered again.

        Raises:
            PushRejectedError: unknown worker, a step out of order, groups or shapes that are not the task's, a value
                that is not finite, a version that this server never had.
        """
        self._check(push)
        if push.step < self._next_step[push.worker]:
            return self._reply(push.worker)
        rate = self._schedule(math.floor(self._rounds))
        for name, gradient in push.gradients.items():
            self._groups[name].apply(as_tensor(gradient), rate)
        self._records.append(
            StepRecord(
                worker=push.worker,
                task=self._workers[push.worker],
                step=push.step,
                round=math.floor(self._rounds),
                version=self._version + 1,
                staleness=self._version - push.version,
                rate=rate,
                loss=push.loss,
                images=push.images,
                seconds=push.seconds,
                skipped=push.skipped,
                bad_images=push.bad_images,
            )
        )
        self._version += 1
        self._next_step[push.worker] += 1
        self._applied[push.worker] = (self._version, rate)
        before = self._rounds // self._evaluate_every
        # Exact, so that K workers' K-th parts add up to whole rounds and all tasks see one rate per round.
        self._rounds += Fraction(1, len(self._active))
        if self._rounds // self._evaluate_every > before:
            self._put_aside()
        return self._reply(push.worker)

    def finish(self, worker: str) -> None:
        """A worker has made its last step: it no longer counts for rounds. After the last one, the end is put aside."""
        self._active.discard(worker)
        if not self._active and self._last_snapshot < self._version:
            self._put_aside()

    def snapshot(self, version: int, task: str) -> dict[str, GroupValues]:
        """A version put aside: the groups on the server that the task uses."""
        groups = self._snapshots[version].groups
        return {name: groups[name] for name in self._uses[task]}

    def pending(self, task: str) -> list[int]:
        """Versions put aside that this task has not handed metrics in for, oldest first."""
        return [version for version, snapshot in sorted(self._snapshots.items()) if task not in snapshot.metrics]

    def hand_in(self, version: int, task: str, metrics: dict[str, float], private: dict[str, GroupValues]) -> None:
        """A task's validation metrics at a version, with its private tensors as of its last push up to that version."""
        snapshot = self._snapshots[version]
        snapshot.metrics[task] = metrics
        snapshot.groups |= private
        if len(snapshot.metrics) < len(self._uses):
            return
        del self._snapshots[version]
        mean = sum(task_metrics["top1"] for task_metrics in snapshot.metrics.values()) / len(snapshot.metrics)
        best = mean > self._best[0]
        if best:
            self._best = (mean, snapshot)
        if self._latest is None or version > self._latest.version:
            self._latest = snapshot
        self._evaluations.append(Evaluation(version, snapshot.round, snapshot.metrics, best))

    def drain(self) -> tuple[list[StepRecord], list[Evaluation]]:
        """What happened since the last call; each record is handed out once."""
        records, evaluations = self._records, self._evaluations
        self._records, self._evaluations = [], []
        return records, evaluations

    def result(self) -> dict[str, Snapshot]:
        """The `last` and the `best` version, complete with every task's private tensors."""
        assert self._latest is not None
        assert self._best[1] is not None
        assert not self._snapshots
        return {"last": self._latest, "best": self._best[1]}

    def _put_aside(self) -> None:
        values = {name: group.state() for name, group in self._groups.items()}
        self._snapshots[self._version] = Snapshot(self._version, math.floor(self._rounds), values)
        self._last_snapshot = self._version

    def _reply(self, worker: str) -> Reply:
        task = self._workers[worker]
        applied_version, rate = self._applied[worker]
        return Reply(
            version=self._version,
            applied_version=applied_version,
            rate=rate,
            groups={name: self._groups[name].state() for name in self._uses[task]},
            pending=tuple(self.pending(task)),
        )

    def _check(self, push: Push) -> None:
        if push.worker not in self._workers:
            raise PushRejectedError(
                f"A push came from worker '{push.worker}', but this server knows {sorted(self._workers)}. "
                "Pass this run's server to every worker."
            )
        where = f"Push {push.step} of worker '{push.worker}' (task '{self._workers[push.worker]}')"
        expected = self._next_step[push.worker]
        if push.step not in (expected, expected - 1):
            raise PushRejectedError(
                f"{where} is out of order: step {expected} is next. Push every step once, in order."
            )
        if push.version > self._version:
            raise PushRejectedError(
                f"{where} was computed on version {push.version}, but this server is at {self._version}: "
                "the worker holds values of another run. Pull before the first step."
            )
        wanted = {name: self._groups[name].layout.pushed for name in self._uses[self._workers[push.worker]]}
        wanted = {name: size for name, size in wanted.items() if size}
        found = {name: gradient.size for name, gradient in push.gradients.items()}
        if found != wanted or any(gradient.dtype != np.float32 for gradient in push.gradients.values()):
            raise PushRejectedError(f"{where} carries floats per group {found}; expected float32 {wanted}.")
        for name, gradient in push.gradients.items():
            if not np.isfinite(gradient).all():
                raise PushRejectedError(
                    f"{where} holds a gradient that is not finite in group '{name}' (loss {push.loss:g}). "
                    "Lower optimizer.rate, or look at the images of this step."
                )
