"""The parameter server: decides which pushes are applied, in which order and at which rate, and counts."""

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Protocol

from multitask.server.messages import (
    Evaluation,
    Gradients,
    GroupValues,
    Key,
    OutOfStepError,
    Push,
    PushRejectedError,
    Reply,
    SnapshotRequest,
    StepRecord,
    mean_top1,
)
from multitask.server.progress import Progress
from multitask.server.schedules import Schedule
from multitask.server.shard import GroupUpdate, Shard, Update


@dataclass(frozen=True)
class ServedTask:
    """What the server knows of a task."""

    shared: tuple[str, ...]
    """Groups that it shares with other tasks, or could."""
    private: tuple[str, ...] = ()
    """Its own groups that lie on the server, because it has several workers."""
    weight: float = 1.0
    """Of its workers' gradients in a mean over workers."""

    @property
    def groups(self) -> tuple[str, ...]:
        return self.shared + self.private


@dataclass(frozen=True)
class Rules:
    """When pushes are applied, and when versions are put aside."""

    evaluate_every_rounds: int
    save_every_rounds: int | None = None
    save_every_s: float | None = None
    together: bool = False
    """A round's pushes are applied as one weighted mean (`sync`), not each at once (`async`, `bounded`)."""
    bound: int | None = None
    """Steps by which a worker may be ahead of the slowest one; None for no bound."""
    in_flight: int = 0
    divide_rate_by_staleness: bool = False


class OtherShards(Protocol):
    """The shards in other processes: do the same as the one here, in the same order."""

    def apply(self, update: Update, done: Iterable[Key]) -> None: ...
    def take_snapshot(self, version: int, slots: bool) -> None: ...
    def drop_snapshot(self, version: int) -> None: ...


@dataclass(frozen=True)
class CompleteSnapshot:
    """A version put aside, with everything that the workers hold of it; the shards keep the rest until released."""

    progress: Progress
    evaluation: Evaluation | None
    """With the private groups that workers hold."""
    saved: dict[str, GroupValues] | None
    """The private groups that workers hold, with slots; for a checkpoint."""


@dataclass
class PendingSnapshot:
    request: SnapshotRequest
    progress: Progress
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    evaluated: dict[str, GroupValues] = field(default_factory=dict)
    savers: set[str] = field(default_factory=set)
    saved: dict[str, GroupValues] = field(default_factory=dict)


@dataclass(frozen=True)
class _Answer:
    """What became of a worker's push."""

    step: int | None
    """The push's; None before the first one."""
    version: int
    rate: float
    rejected: str | None = None
    redone: bool = False


class ParameterServer:
    """A plain class; the server engines make it an actor, engine `local` calls it in one process.

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
    ) -> None:
        """Args:
        shard: the range of every group that this process holds.
        workers: worker -> its task, in the order in which gradients are added up.
        schedule: rounds done -> rate.
        progress: where the run stands; the shard's values are those of that moment.
        others: the other shards, if there are any.
        on_record: called with what is noted of each push.
        """
        self.shard = shard
        self._shards: list[Shard | OtherShards] = [shard] if others is None else [shard, others]
        self._tasks = dict(tasks)
        self._workers = dict(workers)
        self._evaluators = {task: worker for worker, task in reversed(self._workers.items())}
        """Task -> its first worker."""
        self._schedule = schedule
        self._rules = rules
        self._progress = deepcopy(progress)
        self._active = set(workers)
        self._incarnation = dict.fromkeys(workers, 0)
        self._redo_until = dict.fromkeys(workers, 0)
        self._answers = {name: deque([self._answer(name)], maxlen=rules.in_flight + 1) for name in workers}
        """Oldest first: a worker may send its next push before it has heard of the one before."""
        self._arrived: dict[str, Push] = {}
        """This round's pushes, where they are applied together."""
        self._queue = dict.fromkeys(workers, 0)
        """Workers that were waiting when this one's latest push arrived."""
        self._rejected: set[str] = set()
        """Workers whose push of this round was rejected."""
        self._waiting: dict[int, PendingSnapshot] = {}
        self._completed: dict[int, CompleteSnapshot] = {}
        self._evaluated_version = self._saved_version = -1
        self._saved_at = time.monotonic()
        self._pause_wanted = self._pausing = False
        self._incarnation_of_server = time.time_ns()
        self._heard = dict.fromkeys(workers, time.monotonic())
        self._on_record = on_record
        self._records: list[StepRecord] = []

    # What workers call.

    def join(self, worker: str, incarnation: int, step: int | None, position: int = 0) -> None:
        """A worker's process starts, or comes back after the server was restored.

        Args:
            incarnation: counts the processes of this worker.
            step: steps that the private tensors which it holds have learned from; None if it holds none, and goes on
                at the server's step.
            position: of its stream after that step.
        """
        self._check_worker(worker, incarnation)
        self._incarnation[worker] = incarnation
        self.report_alive(worker)
        progress = self._progress.workers[worker]
        if step is not None and step > progress.step:
            lost = step - progress.step
            progress.lost += lost
            progress.step, progress.position = step, position
            self._count_rounds(lost)
        self._redo_until[worker] = progress.step if step is not None else 0
        self._answers[worker].clear()
        self._answers[worker].append(self._answer(worker))

    def push(self, push: Push, gradients: Gradients, problems: Sequence[str | None] = ()) -> None:
        """Take in one worker's gradients: apply them, exactly once, or with those of the round.

        A push whose step is done changes nothing.

        Args:
            gradients: this process's range of the groups that the task uses.
            problems: what the other shards found wrong with theirs.
        Raises:
            PushRejectedError: unknown worker, an earlier incarnation, a step out of order, a version that this server
                never had. What else is wrong stands in the reply.
        """
        worker = push.worker
        self._check_worker(worker, push.incarnation)
        self.report_alive(worker)
        self._queue[worker] = len(self._arrived) + sum(map(self._is_ahead, self._active))
        progress = self._progress.workers[worker]
        if push.step < progress.step or (worker in self._arrived and push.step == progress.step):
            if push.step < self._redo_until[worker]:
                progress.redone += 1
                self._answers[worker].append(self._answer(worker, push.step, redone=True))
                self._note(push, redone=True)
            if push.step < progress.step:  # what its round still waits for stays
                self._apply({}, [push])
            return
        self._check_order(push)
        problem = next(filter(None, (push.problem, *problems)), None)
        problem = problem or self.shard.stash(push.key, gradients, self.groups_of(worker))
        if problem:
            self._reject(push, problem)
        self._arrived[worker] = push
        if not self._rules.together:
            self._apply_arrived()
        else:
            self._apply_round_if_complete()

    def is_early(self, push: Push) -> bool:
        """It was sent after another push of the same process, and has overtaken it."""
        if push.incarnation != self._incarnation.get(push.worker):
            return False
        return 0 < push.step - self._progress.workers[push.worker].step <= self._rules.in_flight

    def reply(self, worker: str, step: int | None = None) -> Reply | None:
        """How things stand for a worker; None while it has to wait for others.

        Args:
            step: of the push that is answered; the latest one by default.
        """
        if worker in self._arrived or self._is_ahead(worker):
            return None
        progress, answers = self._progress.workers[worker], self._answers[worker]
        answer = next((answer for answer in answers if answer.step == step), answers[-1])
        return Reply(
            version=self._progress.version,
            applied_version=answer.version,
            rate=answer.rate,
            requests=self.snapshot_requests(worker),
            rejected=answer.rejected,
            pause=self._pausing,
            step=progress.step,
            position=progress.position,
        )

    def groups_of(self, worker: str) -> tuple[str, ...]:
        """The groups on the server that the worker's task uses."""
        return self._tasks[self._workers[worker]].groups

    def finish(self, worker: str) -> None:
        """A worker has made its last step: it no longer counts for rounds. After the last one, the end is put aside."""
        if worker not in self._active:
            return
        self._active.discard(worker)
        if self._active:
            self._apply_round_if_complete()
        else:
            self._take_snapshot(evaluate=True, save=False)

    def snapshot_requests(self, worker: str) -> tuple[SnapshotRequest, ...]:
        """Versions put aside for which this worker has something to hand in, oldest first."""
        task = self._workers[worker]
        waiting = [aside for _, aside in sorted(self._waiting.items())]
        return tuple(
            aside.request
            for aside in waiting
            if (aside.request.evaluate and worker == self._evaluators[task] and task not in aside.metrics)
            or (aside.request.save and worker not in aside.savers)
        )

    def workers_with_requests(self) -> list[str]:
        """Workers that have something to hand in."""
        return [worker for worker in self._workers if self.snapshot_requests(worker)]

    def report_evaluation(
        self, request: SnapshotRequest, task: str, metrics: dict[str, float], private: dict[str, GroupValues]
    ) -> None:
        """A task's validation metrics at a version, with its private tensors as of its last push up to that version."""
        aside = self._pending_of(request)
        if aside is not None:
            aside.metrics[task] = metrics
            aside.evaluated |= private
            self._complete(request.version)

    def report_state(
        self, request: SnapshotRequest, worker: str, step: int, position: int, private: dict[str, GroupValues]
    ) -> None:
        """What a worker holds as of its last push up to a version, with its optimiser, for the checkpoint.

        Args:
            step, position: of the worker and its stream at that moment.
        """
        aside = self._pending_of(request)
        if aside is not None:
            progress = aside.progress.workers[worker]
            progress.private_step, progress.private_position = step, position
            aside.savers.add(worker)
            aside.saved |= private
            self._complete(request.version)

    def report_alive(self, worker: str) -> None:
        """A sign of life, for a worker that is busy without pushing."""
        self._heard[worker] = time.monotonic()

    # What the driver calls.

    def drain(self) -> tuple[list[StepRecord], dict[int, CompleteSnapshot], Progress]:
        """What happened since the last call, versions that are complete (each handed out once), and where things stand.

        The shards keep a version's values until `release`.
        """
        records, completed = self._records, self._completed
        self._records, self._completed = [], {}
        return records, completed, deepcopy(self._progress)

    def drop_snapshot(self, version: int) -> None:
        """Forget a version put aside, unless something more is asked of it."""
        if version in self._waiting or version in self._completed:
            return
        for shard in self._shards:
            shard.drop_snapshot(version)

    def pause(self) -> None:
        """Let every worker stop after its step; one whose pushes are applied together, at the end of its round."""
        self._pause_wanted = True
        self._pausing = self._pausing or not self._rules.together

    def snapshot_for_checkpoint(self) -> None:
        """Put the values aside for a checkpoint as they stand, when all workers have stopped."""
        self._take_snapshot(evaluate=False, save=True)

    def has_ended(self) -> bool:
        """All workers have made their last step, or have paused, and nothing is asked of them any more."""
        snapshot_for_checkpoint = self._saved_version if self._active else self._evaluated_version
        return (
            (self._pausing or not self._active)
            and not self._waiting
            and snapshot_for_checkpoint == self._progress.version
        )

    def silent_workers(self, seconds: float, working: Collection[str]) -> list[str]:
        """Workers of which nothing was heard for so long, though they work and wait for no other one.

        The time of those that wait begins when they go on, so ask again and again.

        Args:
            working: those that were asked for something.
        """
        for worker in self._workers:
            if worker not in working or self.reply(worker) is None:
                self.report_alive(worker)
        now = time.monotonic()
        return [worker for worker in self._workers if now - self._heard[worker] > seconds]

    # How it is done.

    def _answer(self, worker: str, step: int | None = None, **about: Any) -> _Answer:
        return _Answer(step, self._progress.version, self._private_rate(worker), **about)

    def _check_worker(self, worker: str, incarnation: int) -> None:
        if worker in self._workers and incarnation >= self._incarnation[worker]:
            return
        self._progress.rejected_calls += 1
        if worker not in self._workers:
            raise PushRejectedError(
                f"A push came from worker '{worker}', but this server knows {sorted(self._workers)}. "
                "Pass this run's server to every worker."
            )
        raise PushRejectedError(
            f"A push came from process {incarnation} of worker '{worker}', but process "
            f"{self._incarnation[worker]} took its place. Nothing was applied; the earlier process has to end."
        )

    def _check_order(self, push: Push) -> None:
        where = f"Push {push.step} of worker '{push.worker}' (task '{self._workers[push.worker]}')"
        expected, version = self._progress.workers[push.worker].step, self._progress.version
        if push.step != expected:
            raise OutOfStepError(f"{where} is out of order: step {expected} is next. Push every step once, in order.")
        if push.version > version:
            raise OutOfStepError(
                f"{where} was computed on version {push.version}, but this server is at {version}: "
                "the worker holds values of another run. Pull before the first step."
            )

    def _reject(self, push: Push, problem: str) -> None:
        worker = push.worker
        self._progress.workers[worker].rejected += 1
        reason = (
            f"Push {push.step} of worker '{worker}' (task '{self._workers[worker]}') was rejected: {problem} "
            f"(loss {push.loss:g}). Lower optimizer.rate, or look at the images of this step."
        )
        self._rejected.add(worker)
        self._answers[worker].append(self._answer(worker, push.step, rejected=reason))
        self._note(push, rejected=reason)

    def _apply_round_if_complete(self) -> None:
        if self._arrived and self._arrived.keys() >= self._active:
            self._apply_arrived()
            self._pausing = self._pause_wanted

    def _apply_arrived(self) -> None:
        """One update by the pushes that arrived; those that were rejected count as steps and change nothing."""
        pushes = [self._arrived[worker] for worker in self._workers if worker in self._arrived]
        good = [push for push in pushes if push.worker not in self._rejected]
        self._arrived, self._rejected = {}, set()
        update = self._update(good)
        for push in good:
            self._note(push)
        rates = {push.worker: self._private_rate(push.worker) for push in good}
        self._apply(update, pushes)
        self._progress.version += bool(good)
        for push in pushes:
            self._progress.workers[push.worker].step += 1
            self._progress.workers[push.worker].position = push.position
        for push in good:
            self._answers[push.worker].append(_Answer(push.step, self._progress.version, rates[push.worker]))
        self._count_rounds(len(pushes))

    def _update(self, pushes: Sequence[Push]) -> Update:
        """For each group that one of the pushes carries: whose gradients, with which weights, at which rate."""
        update: Update = {}
        for name in dict.fromkeys(name for push in pushes for name in self.groups_of(push.worker)):
            users = [push for push in pushes if name in self.groups_of(push.worker)]
            tasks = [self._tasks[self._workers[push.worker]] for push in users]
            private = name in tasks[0].private
            rate = self._private_rate(users[0].worker) if private else self._schedule(math.floor(self._progress.rounds))
            if self._rules.divide_rate_by_staleness:
                rate /= max(1, max(self._staleness(push) for push in users))
            keys = tuple(push.key for push in users)
            update[name] = GroupUpdate(keys, tuple(task.weight for task in tasks), rate)
        return update

    def _apply(self, update: Update, done: Sequence[Push]) -> None:
        for shard in self._shards:
            shard.apply(update, [push.key for push in done])

    def _staleness(self, push: Push) -> int:
        return self._progress.version - push.version

    def _note(self, push: Push, *, rejected: str | None = None, redone: bool = False) -> None:
        record = StepRecord(
            worker=push.worker,
            task=self._workers[push.worker],
            step=push.step,
            round=math.floor(self._progress.rounds),
            version=self._progress.version + (not rejected and not redone),
            staleness=self._staleness(push),
            rate=self._private_rate(push.worker),
            loss=push.loss,
            images=push.images,
            seconds=push.seconds,
            skipped=push.skipped,
            bad_images=push.bad_images,
            pid=push.pid,
            queue=self._queue[push.worker],
            rejected=rejected,
            redone=redone,
        )
        self._records.append(record)
        self._on_record(record)

    def _private_rate(self, worker: str) -> float:
        """A task's own schedule, which starts when the task joins the run."""
        first = self._progress.first_round.get(self._workers[worker], 0)
        return self._schedule(max(0, math.floor(self._progress.rounds) - first))

    def _is_ahead(self, worker: str) -> bool:
        """The worker's next step is too far ahead of the slowest worker's."""
        if self._rules.bound is None or self._pausing or worker not in self._active or self._answers[worker][-1].redone:
            return False
        slowest = min(self._lap(name) for name in self._active)
        return self._lap(worker) + self._rules.in_flight - slowest >= self._rules.bound

    def _lap(self, worker: str) -> int:
        progress = self._progress.workers[worker]
        return progress.lap + progress.step

    def _count_rounds(self, steps: int) -> None:
        """Exact, so that K workers' K-th parts add up to whole rounds and all tasks see one rate per round."""
        before, rules = self._progress.rounds, self._rules
        self._progress.rounds += Fraction(steps, max(1, len(self._active)))
        now = self._progress.rounds
        evaluate = now // rules.evaluate_every_rounds > before // rules.evaluate_every_rounds
        by_rounds = rules.save_every_rounds and now // rules.save_every_rounds > before // rules.save_every_rounds
        by_time = rules.save_every_s is not None and time.monotonic() - self._saved_at > rules.save_every_s
        save = bool(by_rounds or by_time) and not any(aside.request.save for aside in self._waiting.values())
        if evaluate or save:
            self._take_snapshot(evaluate=evaluate, save=save)

    def _take_snapshot(self, *, evaluate: bool, save: bool) -> None:
        version = self._progress.version
        evaluate = evaluate and version > self._evaluated_version
        save = save and version > self._saved_version
        if not (evaluate or save):
            return
        if evaluate:
            self._evaluated_version = version
        if save:
            self._saved_version, self._saved_at = version, time.monotonic()
        for shard in self._shards:
            shard.take_snapshot(version, save)
        earlier = self._waiting.get(version)
        if earlier is None:
            self._waiting[version] = PendingSnapshot(
                SnapshotRequest(version, evaluate, save, self._incarnation_of_server), deepcopy(self._progress)
            )
        else:
            earlier.request = replace(
                earlier.request, evaluate=evaluate or earlier.request.evaluate, save=save or earlier.request.save
            )

    def _pending_of(self, request: SnapshotRequest) -> PendingSnapshot | None:
        """What waits for a worker's part; None where this is done, or was put aside before the server was restored."""
        aside = self._waiting.get(request.version)
        return aside if aside is not None and aside.request.server_incarnation == request.server_incarnation else None

    def _complete(self, version: int) -> None:
        """Hand a version to the driver when all tasks and workers have handed in what they hold of it."""
        aside = self._waiting[version]
        request, metrics = aside.request, aside.metrics
        if (request.evaluate and metrics.keys() < self._tasks.keys()) or (
            request.save and aside.savers < self._workers.keys()
        ):
            return
        del self._waiting[version]
        evaluation = None
        if request.evaluate:
            mean = mean_top1(metrics.values())
            best = mean > self._progress.best_top1
            self._progress.best_top1 = max(mean, self._progress.best_top1)
            evaluation = Evaluation(version, math.floor(aside.progress.rounds), metrics, best, aside.evaluated)
        earlier = self._completed.get(version, CompleteSnapshot(aside.progress, None, None))
        # What is saved goes with the steps that it has learned from.
        progress, saved = (aside.progress, aside.saved) if request.save else (earlier.progress, earlier.saved)
        progress.best_top1 = self._progress.best_top1
        self._completed[version] = CompleteSnapshot(progress, evaluation or earlier.evaluation, saved)
