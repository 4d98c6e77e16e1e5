"""The parameter server: decides which pushes are applied, in which order and at which rate, and counts them."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from multitask.server.clock import Clock
from multitask.server.liveness import Liveness
from multitask.server.members import Answer, Member
from multitask.server.messages import Gradients, GroupValues, Push, Reply, SnapshotRequest, StepRecord
from multitask.server.progress import Progress
from multitask.server.records import Records
from multitask.server.rejections import check_order, rejection, replaced_process, unknown_worker
from multitask.server.rules import Rules, ServedTask
from multitask.server.schedules import Schedule
from multitask.server.shard import OtherShards, Shard, Update
from multitask.server.snapshots import CompleteSnapshot, Snapshots
from multitask.server.updates import Updates


class News(NamedTuple):
    """What the driver hears when it drains the server."""

    records: list[StepRecord]
    """One record for each push since the last call."""
    snapshots: dict[int, CompleteSnapshot]
    """Version -> its snapshot, for all snapshots that were completed since the last call."""
    progress: Progress
    """A copy of the run's counters as they are now."""


class ParameterServer:
    """Decides what happens to each push. A plain class: the server engines make it an actor, `local` calls it directly.

    `Shard` holds the values, `Member` knows one worker, `Updates` computes rates, `Snapshots` keeps the versions that
    wait for reports, `Records` the pushes that were noted, and `Liveness` the signs of life.

    Source: Mudrakarta et al., "K for the Price of 1", ICLR 2019, section 5.3: independent, asynchronous updates of
    shared weights, each worker bound to one task. The paper keeps private weights on the server too; here they stay
    with their worker unless the task has several.
    """

    def __init__(
        self,
        shard: Shard,
        tasks: Mapping[str, ServedTask],
        workers: Mapping[str, str],
        schedule: Schedule,
        rules: Rules,
        progress: Progress,
        others: OtherShards | None = None,
        on_record: Callable[[StepRecord], None] = lambda _: None,
        clock: Clock = time,
    ) -> None:
        """Args:
        shard: the range of every group that this process holds.
        workers: worker -> its task, in the order in which gradients are added up.
        schedule: rounds done -> rate.
        progress: the run's counters at the version of the shard's values; copied.
        others: the other shards, if there are any.
        on_record: called with the record of each push.
        clock: the time of this process.
        """
        self.shard = shard
        self._clock = clock
        self.liveness = Liveness(workers, self._clock.monotonic())
        self._shards: list[Shard | OtherShards] = [shard] if others is None else [shard, others]
        self._rules = rules
        self._progress = progress = progress.copy()
        self._updates = Updates(tasks, workers, schedule, rules, progress)
        self._snapshots = Snapshots(tasks, workers, rules, progress, self._clock.time_ns(), self._clock.monotonic())
        self._records = Records(self._updates.private_rate, progress, on_record)
        self._members = {
            worker: Member(task, progress.workers[worker], rules.in_flight, self._answer(worker))
            for worker, task in workers.items()
        }
        self._active = set(workers)
        """Workers that have not made their last step."""
        self._slowest: int | None = None
        """The fewest steps of an active worker, or None where it has to be counted again. Counting it for each worker
        that may have to wait would take the square of their number."""
        self._arrived: dict[str, Push] = {}
        """Worker -> its push of the open round, where the pushes of a round are applied together."""
        self._rejected: set[str] = set()
        """Workers whose push in `_arrived` was rejected."""
        self._pause_wanted = self._pausing = False

    # What workers call.

    def join(self, worker: str, incarnation: int, step: int | None, position: int = 0) -> Reply:
        """Make a worker's process known, when it starts and when it comes back after the server was restored.

        The reply never waits for other workers: a worker that is ahead of them has to start too, before any can train.

        Args:
            incarnation: number of the process among all processes that this worker has had.
            step: number of steps that the worker's private tensors have learned from; None if it holds no private
                tensors and goes on at the server's step.
            position: position of the worker's stream after that step.
        Raises:
            PushRejectedError: the worker is unknown, or another process took its place.
        """
        member = self._check_sender(worker, incarnation)
        self.report_alive(worker)
        lost = member.join(incarnation, step, position)
        self._slowest = None
        if lost:
            self._count_rounds(lost)
        member.forget_answers(self._answer(worker))
        return self._reply(worker)

    def push(self, push: Push, gradients: Gradients, problems: Sequence[str | None] = ()) -> None:
        """Take in the gradients of one step and apply them exactly once, at once or together with those of the round.

        A push whose step was made before changes no value. A push whose gradients have a problem changes no value
        either; the reply then carries the reason.

        Args:
            gradients: this process's range of the groups that the task uses.
            problems: what each other shard found wrong with its range, or None.
        Raises:
            PushRejectedError: the worker is unknown, or another process took its place.
            OutOfStepError: the step is out of order, or the server never had the push's version.
        """
        worker = push.worker
        member = self._check_sender(worker, push.incarnation)
        self.report_alive(worker)
        member.queue = len(self._arrived) + self._number_ahead()
        step = member.progress.step
        if push.step < step or (worker in self._arrived and push.step == step):
            self._answer_repeated(push, member)
            return
        check_order(push, member.task, step, self._progress.version)
        problem = next(filter(None, (push.problem, *problems)), None)
        problem = problem or self.shard.stash(push.key, gradients, self.groups_of(worker))
        if problem:
            self._reject(push, member, problem)
        self._arrived[worker] = push
        if self._rules.together:
            self._apply_round_if_complete()
        else:
            self._apply_arrived()

    def is_early(self, push: Push) -> bool:
        """Return whether an earlier push of the same process has not arrived yet. The push must then wait for it."""
        member = self._members.get(push.worker)
        return member is not None and member.is_early(push)

    def milestone(self) -> Fraction | int:
        """Return a value that changes whenever a push lets workers go on that wait for others.

        It is the number of rounds where the pushes of a round are applied together, the steps of the slowest worker
        with a bound, and always 0 where no worker waits.
        """
        if self._rules.together:
            return self._progress.rounds
        return 0 if self._rules.bound is None else self._steps_of_slowest()

    def reply(self, worker: str, step: int | None = None) -> Reply | None:
        """Return the answer to a worker's push; None while the worker has to wait for others.

        Args:
            step: step of the push that is answered; the latest push by default.
        """
        return None if self._waits(worker) else self._reply(worker, step)

    def groups_of(self, worker: str) -> tuple[str, ...]:
        """Return the groups on the server that the worker's task uses."""
        return self._updates.groups_of(worker)

    def finish(self, worker: str, step: int) -> None:
        """Note that a worker has made its last step and no longer counts for rounds.

        When the last worker finishes, the final version is taken for an evaluation.

        Args:
            step: number of steps that the worker has made. A server that went back to a version with fewer of them does
                nothing: the worker has yet to join, and might be replaced before by a process that makes the others.
        """
        if worker not in self._active or self._members[worker].progress.step < step:
            return
        self._active.discard(worker)
        self._slowest = None
        if self._active:
            self._apply_round_if_complete()
        else:
            self._take_snapshot(evaluate=True, save=False)

    def snapshot_requests(self, worker: str) -> tuple[SnapshotRequest, ...]:
        """Return the requests that wait for a report of this worker, oldest version first."""
        return self._snapshots.requests(worker)

    def workers_with_requests(self) -> list[str]:
        """Return the workers that still have to report something."""
        return [worker for worker in self._members if self.snapshot_requests(worker)]

    def report_evaluation(
        self, request: SnapshotRequest, task: str, metrics: dict[str, float], private: dict[str, GroupValues]
    ) -> None:
        """Take in a task's validation metrics at a version.

        Args:
            private: the task's private groups as they were after the worker's last push up to that version.
        """
        self._snapshots.report_evaluation(request, task, metrics, private)

    def report_state(
        self, request: SnapshotRequest, worker: str, step: int, position: int, private: dict[str, GroupValues]
    ) -> None:
        """Take in what a worker held after its last push up to a version, for the checkpoint.

        Args:
            step: number of steps that the private groups have learned from.
            position: position of the worker's stream after that step.
            private: the private groups that the worker holds, with the optimiser's slots.
        """
        self._snapshots.report_state(request, worker, step, position, private)

    def report_alive(self, worker: str) -> None:
        """Note a sign of life of a worker, which may be busy without pushing."""
        self.liveness.report(worker, self._clock.monotonic())

    # What the driver calls.

    def drain(self) -> News:
        """Return what happened since the last call. The shards keep a snapshot's values until `drop_snapshot`."""
        return News(self._records.drain(), self._snapshots.drain(), self._progress.copy())

    def drop_snapshot(self, version: int) -> None:
        """Let the shards forget the values of a version, unless the version is needed again."""
        if not self._snapshots.needs(version):
            for shard in self._shards:
                shard.drop_snapshot(version)

    def pause(self) -> None:
        """Let every worker stop after its step, or after its round where the pushes of a round are applied together."""
        self._pause_wanted = True
        self._pausing = self._pausing or not self._rules.together

    def snapshot_for_checkpoint(self) -> None:
        """Take a snapshot for a checkpoint. The engine calls this when all workers have stopped."""
        self._take_snapshot(evaluate=False, save=True)

    def has_ended(self) -> bool:
        """Return whether all workers have finished or paused, and the last version has all its reports."""
        taken = self._snapshots.saved_version if self._active else self._snapshots.evaluated_version
        return (self._pausing or not self._active) and not self._snapshots.pending and taken == self._progress.version

    def silent_workers(self, seconds: float, working: Collection[str]) -> list[str]:
        """Return the workers that were not heard of for more than `seconds`, though they wait for no other one.

        The time of a worker starts only when it has work to do, so the caller has to ask regularly.

        Args:
            working: workers that were asked for something.
        """
        busy = [worker for worker in self._members if worker in working and not self._waits(worker)]
        return self.liveness.silent(seconds, self._clock.monotonic(), busy)

    # How pushes are taken in.

    def _check_sender(self, worker: str, incarnation: int) -> Member:
        """Return the worker that calls, if the call comes from its newest process; count and reject any other call."""
        member = self._members.get(worker)
        if member is not None and incarnation >= member.incarnation:
            return member
        self._progress.rejected_calls += 1
        if member is None:
            raise unknown_worker(worker, self._members)
        raise replaced_process(worker, incarnation, member.incarnation)

    def _answer_repeated(self, push: Push, member: Member) -> None:
        """Answer a push whose step the server has already, and change no value.

        A worker that was replaced makes steps again to teach its private tensors; this gives a new answer and a record.
        Any other repeated push keeps its first answer.
        """
        if member.is_redone(push):
            member.progress.redone += 1
            member.answer(self._answer(push.worker, push.step, redone=True))
            self._records.note(push, member, redone=True)
        if push.step < member.progress.step:  # the open round still needs the gradients of its own step
            self._apply({}, [push])

    def _reject(self, push: Push, member: Member, problem: str) -> None:
        """Answer a push with the reason why it is not applied. The step counts as made."""
        reason = rejection(push, member.task, problem)
        member.progress.rejected += 1
        self._rejected.add(push.worker)
        member.answer(self._answer(push.worker, push.step, rejected=reason))
        self._records.note(push, member, rejected=reason)

    def _reply(self, worker: str, step: int | None = None) -> Reply:
        member = self._members[worker]
        answer = member.answer_to(step)
        return Reply(
            version=self._progress.version,
            rate=answer.rate,
            requests=self._snapshots.requests(worker, None if step is None else step + 1),
            rejected=answer.rejected,
            pause=self._pausing,
            step=member.progress.step,
            position=member.progress.position,
        )

    def _answer(self, worker: str, step: int | None = None, **about: Any) -> Answer:
        """Return an answer with the present rate."""
        return Answer(step, self._updates.private_rate(worker), **about)

    # How pushes are applied.

    def _apply_round_if_complete(self) -> None:
        """Apply the open round when all active workers have pushed. A pause starts at the end of a round."""
        if self._arrived and self._arrived.keys() >= self._active:
            self._apply_arrived()
            self._pausing = self._pause_wanted

    def _apply_arrived(self) -> None:
        """Make one update of the pushes that arrived. Rejected ones count as steps and change no value."""
        pushes = [self._arrived[worker] for worker in self._members if worker in self._arrived]
        good = [push for push in pushes if push.worker not in self._rejected]
        self._arrived, self._rejected = {}, set()
        update = self._updates.of(good)
        for push in good:
            self._records.note(push, self._members[push.worker])
        self._apply(update, pushes)
        self._progress.version += bool(good)
        for push in pushes:
            progress = self._members[push.worker].progress
            progress.step, progress.position = progress.step + 1, push.position
        self._slowest = None
        for push in good:
            self._members[push.worker].answer(self._answer(push.worker, push.step))
        self._count_rounds(len(pushes))

    def _apply(self, update: Update, done: Sequence[Push]) -> None:
        """Let every shard make an update and forget the gradients of the pushes that are done."""
        for shard in self._shards:
            shard.apply(update, [push.key for push in done])

    # When a worker waits, and when a snapshot is taken.

    def _waits(self, worker: str) -> bool:
        """Return whether a worker has to wait for others: for the end of its round, or for the slowest worker."""
        return worker in self._arrived or self._is_ahead(worker)

    def _is_ahead(self, worker: str) -> bool:
        """Return whether a worker's next step is too far ahead of the slowest worker's (bounded staleness).

        A step that is made again does not wait, because it changes no value on the server.
        """
        bound, members = self._rules.bound, self._members
        if bound is None or self._pausing or worker not in self._active or members[worker].latest.redone:
            return False
        slowest = self._steps_of_slowest()
        return members[worker].progress.reached + self._rules.in_flight - slowest >= bound

    def _number_ahead(self) -> int:
        """Return the number of workers that have to wait for the slowest one."""
        bound, members = self._rules.bound, self._members
        if bound is None:
            return 0
        # Most workers are not that far, and need no closer look.
        waits_from = self._steps_of_slowest() + bound - self._rules.in_flight
        return sum(members[name].progress.reached >= waits_from and self._is_ahead(name) for name in self._active)

    def _steps_of_slowest(self) -> int:
        if self._slowest is None:
            self._slowest = min((self._members[name].progress.reached for name in self._active), default=0)
        return self._slowest

    def _count_rounds(self, steps: int) -> None:
        """Count steps as parts of a round, and take the snapshots that are due.

        With K active workers a step counts as 1/K of a round. Fractions are exact, so that K steps make exactly one
        round.
        """
        before = self._progress.rounds
        self._progress.rounds += Fraction(steps, max(1, len(self._active)))
        evaluate, save = self._snapshots.due(before, self._clock.monotonic())
        self._take_snapshot(evaluate=evaluate, save=save)

    def _take_snapshot(self, *, evaluate: bool, save: bool) -> None:
        """Ask for an evaluation or a checkpoint of the present version, and let the shards keep its values."""
        request = self._snapshots.take(evaluate=evaluate, save=save, now=self._clock.monotonic())
        if request is not None:
            for shard in self._shards:
                shard.take_snapshot(request.version, request.save)
