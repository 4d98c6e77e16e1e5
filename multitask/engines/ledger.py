"""Engine `allreduce`: the ledger, which decides as a parameter server does and holds no values."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from multitask.cluster.interface import Actor, Cluster
from multitask.engines.loss import LastAnswer, require_begun
from multitask.engines.metrics import ServerMetrics
from multitask.engines.operations import Ledger, Operation
from multitask.job.checkpoint import CheckpointStore
from multitask.job.job import Job
from multitask.server.messages import GroupValues, Push, PushRejectedError, Reply, SnapshotRequest, StepRecord
from multitask.server.parameter_server import CompleteSnapshot, ParameterServer
from multitask.server.progress import Progress


def busy_workers(
    *, starting: bool, joined: Collection[str], resting: Collection[str], rounds_behind: Mapping[str, int]
) -> set[str]:
    """Return the workers that wait for no other worker; only a busy worker can be silent because it hangs.

    A rank rests when it has made its last step, or pauses. It still takes part in the sums of every round, in the order
    in which the ledger wrote the rounds down, and evaluates snapshots in between. A sum waits for its slowest rank, so
    a resting rank that evaluates delays the ranks that train, and the resting ranks that have read more of the ledger.
    The resting rank with the most unread rounds waits for nobody: all other ranks have already contributed to these
    rounds, or will before they evaluate again.

    A worker that is not in the returned set can hang too. It is found later: sooner or later all others wait for it,
    and then it is in the set.

    Args:
        starting: not all ranks of the group have joined; those that have joined wait for the others.
        joined: workers that have joined and were not found silent.
        resting: workers that have made their last step, or pause.
        rounds_behind: resting worker with open snapshot requests -> number of ended rounds that it has not read of.
    """
    if starting:
        return set()
    furthest = max(rounds_behind.values(), default=0)
    behind = {worker for worker, rounds in rounds_behind.items() if rounds == furthest}
    return behind or set(joined) - set(resting)


class GroupState:
    """What the ledger holds for one start of the worker group."""

    def __init__(self, cluster: Cluster, job: Job) -> None:
        """Args:
        job: at the checkpoint that the group starts from.
        """
        self.incarnation = cluster.clock.time_ns()
        """Identifies this start of the group: the ledger rejects calls from the ranks of an earlier one."""
        self.job = job
        self.ledger = Ledger(job.workers)
        on_record = ServerMetrics(cluster, job).note
        self.server = job.make_server(self.ledger, on_record=on_record, clock=cluster.clock)
        self.resting: set[str] = set()
        """Workers that have made their last step, or pause."""
        self._changed = asyncio.Event()

    def all_rest(self) -> bool:
        return self.resting == set(self.job.workers)

    def rounds_behind(self) -> dict[str, int]:
        """Return, for each resting worker with open snapshot requests, the ended rounds that it has not read of."""
        asked = self.resting.intersection(self.server.workers_with_requests())
        return {worker: self.ledger.rounds_behind(worker) for worker in asked}

    async def change(self) -> None:
        """Wait for the next `notify`."""
        await self._changed.wait()

    def notify(self) -> None:
        """Wake up all calls that wait for a change."""
        self._changed.set()
        self._changed = asyncio.Event()


@dataclass(frozen=True)
class GroupStatus:
    """What the driver learns when it asks for the worker group's status."""

    news: tuple[list[StepRecord], dict[int, CompleteSnapshot], Progress]
    """The result of `ParameterServer.drain`."""
    processes: dict[str, int]
    """Worker -> process id, for the workers that have joined the present start of the group."""
    silent: list[str]
    """Workers whose processes were ended because they hung."""
    lost: list[str]
    """Messages about losses since the last status."""
    failure: tuple[str, str] | None
    """The worker that raised an exception, and its text: the run cannot go on."""
    ended: bool
    """All ranks have done all their work, and `news` is the last."""


class LedgerActor:
    """The parameter server of engine `allreduce`: it counts and decides like any other, and holds no values.

    Ray restarts this process when it is lost, and the driver calls `begin` again. The ranks notice the loss and end,
    and Ray Train starts new ones.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._group: GroupState | None = None
        self._begun = asyncio.Event()
        self._starting = True
        self._actors: dict[str, Actor] = {}
        """Workers that have joined the present start of the group and were not found silent."""
        self._processes: dict[str, int] = {}
        """Worker -> process id, for all workers that have joined."""
        self._pause_wanted = False
        self._lost: list[str] = []
        self._failure: tuple[str, str] | None = None
        self._last_status = LastAnswer()

    async def begin(self, job: Job, store: CheckpointStore) -> None:
        """Set the job, and the store with the checkpoint to start from.

        The constructor does not do this, because Ray would repeat its arguments when it restarts the process.
        """
        self._job, self._store = job, store
        self._restart()
        self._begun.set()

    @property
    def server(self) -> ParameterServer:
        """The parameter server of the present start of the group.

        Raises:
            NotBegunError: `begin` was not called.
        """
        return require_begun(self._group).server

    def _restart(self) -> None:
        self._group = GroupState(self._cluster, self._job.restored(self._store.latest()))
        if self._pause_wanted:
            self._group.server.pause()
        self._actors, self._processes = {}, {}

    # Calls of the ranks.

    async def begin_group(self) -> int:
        """Start a new group of ranks at the latest checkpoint, as soon as there is a job; return its incarnation."""
        await self._begun.wait()
        require_begun(self._group).notify()
        self._restart()
        return require_begun(self._group).incarnation

    async def job(self, incarnation: int) -> Job:
        """Return the job at the checkpoint that the group starts from: all ranks must start from the same one."""
        return self._group_of(incarnation).job

    async def join(self, incarnation: int, worker: str, process: int, actor: Actor) -> tuple[Reply, list[Operation]]:
        """Let a worker join the group; the reply names the step at which it begins."""
        group = self._group_of(incarnation)
        group.server.join(worker, 0, None)
        self._actors[worker], self._processes[worker] = actor, process
        self._starting = len(self._processes) < len(group.job.workers)
        return await self._answer(group, worker)

    async def pull(self, incarnation: int, worker: str) -> tuple[Reply, list[Operation]]:
        return await self._answer(self._group_of(incarnation), worker)

    async def push(self, incarnation: int, push: Push) -> tuple[Reply, list[Operation]]:
        group = self._group_of(incarnation)
        group.server.push(push, {})
        return await self._answer(group, push.worker)

    async def snapshot_requests(
        self, incarnation: int, worker: str
    ) -> tuple[tuple[SnapshotRequest, ...], list[Operation]]:
        """Return a worker's open snapshot requests together with the operations that take these snapshots.

        Both come from one moment: other workers may push between two calls.
        """
        group = self._group_of(incarnation)
        return group.server.snapshot_requests(worker), group.ledger.read(worker)

    async def report_state(
        self,
        incarnation: int,
        request: SnapshotRequest,
        worker: str,
        step: int,
        position: int,
        held: dict[str, GroupValues],
    ) -> None:
        group = self._group_of(incarnation)
        group.server.report_state(request, worker, step, position, held)
        group.notify()

    async def report_evaluation(
        self,
        incarnation: int,
        request: SnapshotRequest,
        task: str,
        metrics: dict[str, float],
        held: dict[str, GroupValues],
    ) -> None:
        group = self._group_of(incarnation)
        group.server.report_evaluation(request, task, metrics, held)
        group.notify()

    async def report_alive(self, incarnation: int, worker: str) -> None:
        group = self._group_of(incarnation)
        group.server.report_alive(worker)
        group.notify()

    async def finish(self, incarnation: int, worker: str, step: int) -> None:
        group = self._group_of(incarnation)
        group.server.finish(worker, step)
        group.notify()

    async def rest(self, incarnation: int, worker: str) -> tuple[list[Operation], bool]:
        """Let a worker that has made its last step, or pauses, wait until there are operations or all workers rest.

        Returns:
            The operations that the worker has not read, and whether all workers rest.
        """
        group = self._group_of(incarnation)
        if worker not in group.resting:
            group.resting.add(worker)
            if group.all_rest() and self._pause_wanted:
                group.server.snapshot_for_checkpoint()
            group.notify()
        while not (group.ledger.has_unread(worker) or group.all_rest()):
            await self._change(group)
        return group.ledger.read(worker), group.all_rest()

    async def fail(self, worker: str, message: str) -> None:
        """Note that a worker raised an exception, which ends the run. Only the first counts: others follow from it."""
        self._failure = self._failure or (worker, message)

    # Calls of the driver and of Ray Train's controller.

    async def report(self, silent_s: float, number: int) -> GroupStatus:
        """Return the status of the group, and end the processes of workers that hang; Ray Train does the rest.

        Args:
            silent_s: a worker hangs if it waits for no other worker and gave no sign of life for this many seconds.
            number: counts the calls. A second call with the number of the last one returns the same status again.
        """
        return self._last_status.to(number, lambda: self._status(silent_s))

    def _status(self, silent_s: float) -> GroupStatus:
        group = require_begun(self._group)
        busy = busy_workers(
            starting=self._starting,
            joined=self._actors.keys(),
            resting=group.resting,
            rounds_behind=group.rounds_behind(),
        )
        silent = [worker for worker in group.server.silent_workers(silent_s, busy) if worker in self._actors]
        for worker in silent:
            self._cluster.kill(self._actors.pop(worker))
        lost, self._lost = self._lost, []
        news, ended = group.server.drain(), group.server.has_ended()
        return GroupStatus(news, dict(self._processes), silent, lost, self._failure, ended)

    async def drop_snapshot(self, versions: Sequence[int]) -> None:
        for version in versions:
            self.server.drop_snapshot(version)

    async def pause(self) -> None:
        self._pause_wanted = True
        self.server.pause()

    async def lose(self, message: str) -> None:
        """Note that ranks were lost, or Ray Train itself: all workers are missing until they join the next group."""
        self._lost.append(message)
        self._starting = True
        self._actors, self._processes = {}, {}

    async def starting(self) -> bool:
        """Return whether a group is starting: not all of its ranks have joined."""
        return self._starting

    # Internals.

    def _group_of(self, incarnation: int) -> GroupState:
        """Return the present start of the group.

        Raises:
            PushRejectedError: the caller is a rank of an earlier start.
        """
        if self._group is None or incarnation != self._group.incarnation:
            raise PushRejectedError("This worker group's place was taken by a newer one; its processes have to end.")
        return self._group

    async def _answer(self, group: GroupState, worker: str) -> tuple[Reply, list[Operation]]:
        """Return the reply to a worker and the operations that it has not read, as soon as it can go on."""
        group.notify()
        while (reply := group.server.reply(worker)) is None:
            await self._change(group)
        return reply, group.ledger.read(worker)

    async def _change(self, group: GroupState) -> None:
        """Wait for a change of the group.

        Raises:
            PushRejectedError: the change is that a newer group started.
        """
        await group.change()
        self._group_of(group.incarnation)
