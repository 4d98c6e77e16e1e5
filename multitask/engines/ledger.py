"""Engine `allreduce`: the ledger, which decides as a parameter server does, and holds no values."""

import asyncio
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray

from multitask.engines.loss import Actor, LastAnswer, require_begun
from multitask.engines.metrics import ServerMetrics
from multitask.job.checkpoint import CheckpointStore
from multitask.job.job import Job
from multitask.server.messages import Gradients, Key, Push, PushRejectedError, Reply, SnapshotRequest, StepRecord
from multitask.server.parameter_server import CompleteSnapshot, ParameterServer
from multitask.server.progress import Progress
from multitask.server.shard import Shard, Update

WAIT = timedelta(days=1)
"""How long a collective waits for others, who may be evaluating: Train and the ledger notice who is lost or hangs."""


@dataclass(frozen=True)
class Apply:
    """A round's update, empty where all pushes were rejected."""

    update: Update


@dataclass(frozen=True)
class TakeSnapshot:
    """Put the values aside as they stand."""

    version: int
    slots: bool


@dataclass(frozen=True)
class DropSnapshot:
    version: int


Operation = Apply | TakeSnapshot | DropSnapshot


class Ledger(Shard):
    """A shard without values: it writes down what the server would have it do, for the ranks that hold them."""

    def __init__(self, workers: Iterable[str]) -> None:
        super().__init__({})
        self._unread: dict[str, list[Operation]] = {worker: [] for worker in workers}

    def read(self, worker: str) -> list[Operation]:
        """What happened since this worker read last."""
        unread, self._unread[worker] = self._unread[worker], []
        return unread

    def news(self, worker: str) -> bool:
        return bool(self._unread[worker])

    def rounds_behind(self, worker: str) -> int:
        """How many rounds have ended of which this worker has not read."""
        return sum(isinstance(operation, Apply) for operation in self._unread[worker])

    def stash(self, key: Key, gradients: Gradients, names: Iterable[str]) -> str | None:  # noqa: ARG002
        return None

    def apply(self, update: Update, done: Iterable[Key]) -> None:  # noqa: ARG002
        self._write(Apply(update))

    def take_snapshot(self, version: int, slots: bool) -> None:
        self._write(TakeSnapshot(version, slots))

    def drop_snapshot(self, version: int) -> None:
        self._write(DropSnapshot(version))

    def _write(self, operation: Operation) -> None:
        for unread in self._unread.values():
            unread.append(operation)


@dataclass(frozen=True)
class GroupStatus:
    """What the driver hears of a worker group now and then."""

    news: tuple[list[StepRecord], dict[int, CompleteSnapshot], Progress]
    """What `ParameterServer.drain` returned."""
    processes: dict[str, int]
    """Worker -> process id, of those that have joined the present group."""
    silent: list[str]
    lost: list[str]
    """What was lost since the last report."""
    failure: tuple[str, str] | None
    """Which worker raised, and what: the run cannot go on."""
    ended: bool
    """The work of all ranks is done, and `news` has the last of it."""


class LedgerActor:
    """The server of engine `allreduce`: it counts and decides as any other, and holds no values.

    Ray starts it again when it is lost, and the driver lets it begin; the ranks notice, and Train starts new ones.
    """

    def __init__(self) -> None:
        self._pause_wanted = False
        self._lost: list[str] = []
        self._failure: tuple[str, str] | None = None
        self._reported = LastAnswer()
        self._held: ParameterServer | None = None
        self._group = 0
        self._starting = True

    async def begin(self, job: Job, store: CheckpointStore) -> None:
        """Take what the groups of ranks are to work on. Not in the constructor, as in `ServerActor`."""
        self._job, self._store = job, store
        self._restart()

    @property
    def _server(self) -> ParameterServer:
        return require_begun(self._held)

    def _restart(self) -> None:
        self._restored = job = self._job.restored(self._store.latest())
        self._ledger = Ledger(job.workers)
        self._held = job.make_server(self._ledger, on_record=ServerMetrics(job).note)
        if self._pause_wanted:
            self._server.pause()
        self._group = time.time_ns()
        """Names the group of ranks: those of an earlier one are answered no more."""
        self._actors: dict[str, Actor] = {}
        self._processes: dict[str, int] = {}
        self._resting: set[str] = set()
        self._changed = asyncio.Event()

    # What ranks call.

    async def begin_group(self) -> int:
        """A new group of ranks starts, at the latest checkpoint; returns its number."""
        require_begun(self._held)
        self._notify()
        self._restart()
        return self._group

    async def job(self, group: int) -> Job:
        """The job at the checkpoint that the group starts from: one reading of it for all ranks."""
        self._check(group)
        return self._restored

    async def join(self, group: int, worker: str, process: int, actor: Actor) -> tuple[Reply, list[Operation]]:
        """A worker begins, at the step where the server stands."""
        self._check(group)
        self._server.join(worker, 0, None)
        self._actors[worker], self._processes[worker] = actor, process
        self._starting = len(self._processes) < len(self._job.workers)
        return await self._answer(group, worker)

    async def pull(self, group: int, worker: str) -> tuple[Reply, list[Operation]]:
        return await self._answer(group, worker)

    async def push(self, group: int, push: Push) -> tuple[Reply, list[Operation]]:
        self._check(group)
        self._server.push(push, {})
        return await self._answer(group, push.worker)

    async def call(self, group: int, method: str, *arguments: Any) -> Any:
        self._check(group)
        answer = getattr(self._server, method)(*arguments)
        self._notify()
        return answer

    async def snapshot_requests(self, group: int, worker: str) -> tuple[tuple[SnapshotRequest, ...], list[Operation]]:
        """What is asked of a worker, with the operations that put it aside: others may push at any moment."""
        self._check(group)
        return self._server.snapshot_requests(worker), self._ledger.read(worker)

    async def rest(self, group: int, worker: str) -> tuple[list[Operation], bool]:
        """A worker has made its steps, or pauses: what the others do meanwhile, and whether all of them rest."""
        self._check(group)
        if worker not in self._resting:
            self._resting.add(worker)
            if self._all_rest() and self._pause_wanted:
                self._server.snapshot_for_checkpoint()
            self._notify()
        while not (self._ledger.news(worker) or self._all_rest()):
            await self._change(group)
        return self._ledger.read(worker), self._all_rest()

    async def fail(self, worker: str, message: str) -> None:
        """A worker raised: the run ends. The first message counts, what follows from it does not."""
        self._failure = self._failure or (worker, message)

    # What the driver and Train's controller call.

    async def report(self, silent_s: float, number: int) -> GroupStatus:
        """Args:
        silent_s: a worker of which nothing was heard for so long, though it waits for nobody, is ended; Train does the
            rest.
        number: counts the reports; under that of the last call, the same report once more.
        """
        return self._reported.to(number, lambda: self._report(silent_s))

    def _report(self, silent_s: float) -> GroupStatus:
        silent = [worker for worker in self._server.silent_workers(silent_s, self._working()) if worker in self._actors]
        for worker in silent:
            ray.kill(self._actors.pop(worker))
        lost, self._lost = self._lost, []
        news, ended = self._server.drain(), self._server.has_ended()
        return GroupStatus(news, dict(self._processes), silent, lost, self._failure, ended)

    async def drop_snapshot(self, versions: Sequence[int]) -> None:
        for version in versions:
            self._server.drop_snapshot(version)

    async def pause(self) -> None:
        self._pause_wanted = True
        self._server.pause()

    async def lose(self, message: str) -> None:
        """Ranks are gone, or Train itself, and a new group starts: those who do not join it are missing."""
        self._lost.append(message)
        self._starting = True
        self._actors, self._processes = {}, {}

    async def starting(self) -> bool:
        """Whether a group is on its way: not all of its ranks have joined."""
        return self._starting

    # How it is done.

    def _check(self, group: int) -> None:
        if group != self._group:
            raise PushRejectedError("This worker group's place was taken by a newer one; its processes have to end.")

    async def _answer(self, group: int, worker: str) -> tuple[Reply, list[Operation]]:
        self._check(group)
        self._notify()
        while (reply := self._server.reply(worker)) is None:
            await self._change(group)
        return reply, self._ledger.read(worker)

    def _working(self) -> Collection[str]:
        """Workers that wait for nobody's part in a sum.

        While one that rests evaluates, others may wait for it: those that train, and those that rest and have read of
        more rounds. Whoever is furthest behind waits for nobody: those that train have pushed all that it reads of, and
        those that rest have read of it too and follow it before they evaluate again. One that hangs elsewhere is found
        later: those behind it catch up or are ended, and no round that could ask for more ends without all that train.
        While a group starts, those that have joined wait for the others.
        """
        if self._starting:
            return ()
        workers_with_requests = self._resting.intersection(self._server.workers_with_requests())
        furthest = max(map(self._ledger.rounds_behind, workers_with_requests), default=0)
        behind = {worker for worker in workers_with_requests if self._ledger.rounds_behind(worker) == furthest}
        return behind or self._actors.keys() - self._resting

    def _all_rest(self) -> bool:
        return self._resting == set(self._job.workers)

    async def _change(self, group: int) -> None:
        await self._changed.wait()
        self._check(group)

    def _notify(self) -> None:
        """Let those who wait look again."""
        self._changed.set()
        self._changed = asyncio.Event()
