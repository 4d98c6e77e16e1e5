"""The parameter server and its shards as Ray actors."""

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from multitask.cluster.interface import Actor, Cluster, Ref
from multitask.engines.loss import LastAnswer, NotBegunError, require_begun
from multitask.engines.metrics import ServerMetrics
from multitask.job.job import Job
from multitask.server.messages import Gradients, GroupValues, Key, Push, Reply, StepRecord
from multitask.server.parameter_server import CompleteSnapshot, ParameterServer
from multitask.server.progress import Progress
from multitask.server.shard import Shard, Update

log = logging.getLogger(__name__)

GRACE_S = 1.0
"""Seconds for which published values are kept after newer ones have replaced them. Ray was seen to free values that an
answer refers to before the reader of the answer had told Ray that it holds them."""
Refs = dict[str, Ref[GroupValues]]
"""Group -> reference to one shard's range of its values in the cluster's object store."""


class Published:
    """Keeps one copy of a shard's newest values in the cluster's object store, for all workers that read them."""

    def __init__(self, cluster: Cluster, shard: Shard) -> None:
        self._cluster, self._shard = cluster, shard
        self._refs: dict[str, tuple[int, Ref[GroupValues]]] = {}
        self._replaced: deque[tuple[float, Ref[GroupValues]]] = deque()

    def refs(self, names: Iterable[str]) -> Refs:
        """Return references to the newest values of groups; groups that have changed are put into the store again."""
        now = self._cluster.clock.monotonic()
        while self._replaced and now - self._replaced[0][0] > GRACE_S:
            self._replaced.popleft()
        for name in names:
            group = self._shard.groups[name]
            if self._refs.get(name, (-1, None))[0] != group.updates:
                if name in self._refs:
                    self._replaced.append((now, self._refs[name][1]))
                self._refs[name] = group.updates, self._cluster.put(group.view())
        return {name: self._refs[name][1] for name in names}


class ShardActor:
    """A shard of the server other than the first one, which is in `ServerActor`. It holds no values until `begin`."""

    def __init__(self, cluster: Cluster) -> None:
        torch.set_num_threads(1)
        self._cluster = cluster
        self.incarnation = cluster.clock.time_ns()
        self._begun: tuple[Shard, Published] | None = None
        self._followed = 0
        """Number of changes of the first shard that this shard has made, too."""

    def begin(self, job: Job, number: int) -> int:
        """Take this shard's values from a job, which may stand at a checkpoint.

        Args:
            number: number of this shard, from 1.
        Returns:
            This process's incarnation.
        """
        shard = job.make_shard(number)
        self._begun, self._followed = (shard, Published(self._cluster, shard)), 0
        return self.incarnation

    def ping(self) -> int:
        """Return this process's incarnation."""
        return self.incarnation

    def stash(self, key: Key, gradients: Gradients, names: Sequence[str]) -> str | None:
        """Call `Shard.stash`."""
        return require_begun(self._begun)[0].stash(key, gradients, names)

    def follow(self, number: int, method: str, *arguments: Any) -> None:
        """Make a change that the first shard has made.

        A shard that misses a change no longer has the values of the server's version. So it drops its values and takes
        a new incarnation, as if it had been started again; then the server goes back to a checkpoint with all shards.

        Args:
            number: number of the change since `begin`, from 1.
            method: the method of `Shard` that makes the change.
        """
        shard, _ = require_begun(self._begun)
        self._followed += 1
        try:
            if number != self._followed:
                raise NotBegunError(f"Change {number} of its values came when {self._followed} was next.")
            getattr(shard, method)(*arguments)
        except Exception as error:
            log.warning("A shard of the server could not follow the first one: %s", error)
            self._begun, self.incarnation = None, self._cluster.clock.time_ns()
            raise

    def read(self, names: Sequence[str]) -> Refs:
        """Return references to this shard's newest values of groups."""
        return require_begun(self._begun)[1].refs(names)

    def snapshot(self, version: int) -> dict[str, GroupValues] | None:
        """Call `Shard.snapshot`."""
        return require_begun(self._begun)[0].snapshot(version)


class RemoteShards:
    """Sends the changes of the first shard to the other shards, and does not wait for them.

    Calls from one process arrive in order, and the numbers of the changes let a shard notice a call that got lost.
    """

    def __init__(self, shards: Sequence[Actor]) -> None:
        self._shards = shards
        self._sent = 0

    def apply(self, update: Update, done: Iterable[Key]) -> None:
        self._send("apply", update, list(done))

    def take_snapshot(self, version: int, slots: bool) -> None:
        self._send("take_snapshot", version, slots)

    def drop_snapshot(self, version: int) -> None:
        self._send("drop_snapshot", version)

    def _send(self, method: str, *arguments: Any) -> None:
        self._sent += 1
        for shard in self._shards:
            shard.follow.remote(self._sent, method, *arguments)


class ServerActor:
    """The parameter server with its first shard. It has no job until `begin`.

    The constructor takes no job, because Ray would keep the constructor's arguments and use them when it starts the
    process again, when there may be a newer checkpoint.
    """

    def __init__(self, cluster: Cluster) -> None:
        torch.set_num_threads(1)
        self._cluster = cluster
        self._held: ParameterServer | None = None
        self._drained = LastAnswer()
        self._incarnations: list[int] | None = None
        self._waiting: dict[str, asyncio.Event] = {}
        """Worker -> what wakes up its calls that wait."""

    def begin(self, job: Job, shards: Sequence[Actor] = (), *incarnations: int) -> None:
        """Take the values and the progress of a job, which may stand at a checkpoint.

        Args:
            shards: the other shards, which have begun with the same job.
            incarnations: the results of their `begin`.
        """
        self._others = list(shards)
        self._incarnations = [self._cluster.clock.time_ns(), *incarnations]
        others = RemoteShards(shards) if shards else None
        on_record = ServerMetrics(self._cluster, job).note
        self._held = job.make_server(others=others, on_record=on_record, clock=self._cluster.clock)
        self._published = Published(self._cluster, self._held.shard)

    @property
    def _server(self) -> ParameterServer:
        return require_begun(self._held)

    def ping(self) -> list[int]:
        """Return this server's incarnation, and those that the other shards had when this server began."""
        return require_begun(self._incarnations)

    def join(self, worker: str, incarnation: int, step: int | None, position: int) -> Reply:
        """Call `ParameterServer.join`."""
        reply = self._server.join(worker, incarnation, step, position)
        self._notify_change()
        return reply

    async def pull(self, worker: str) -> tuple[Reply, list[Refs]]:
        """Return the reply to a worker, and each shard's values, as soon as the worker may go on."""
        return await self._answer(worker)

    async def push(self, push: Push, gradients: Gradients, *problems: str | None) -> tuple[Reply, list[Refs]]:
        """Call `ParameterServer.push`; return the reply and each shard's values as soon as the worker may go on.

        Args:
            problems: the answers of the other shards to `stash`.
        """
        # Ray starts a call when all its arguments have arrived, so a call may overtake the one that was sent before it.
        while self._server.is_early(push):
            await self._wait_for_change(push.worker)
        milestone = self._server.milestone()
        self._server.push(push, gradients, problems)
        lets_others_go_on = self._server.milestone() != milestone
        # Let pushes that have arrived meanwhile be applied first, so that values are published once for all of them.
        await asyncio.sleep(0)
        if lets_others_go_on:
            self._notify_change()
        else:  # waking up all others after each push would take the square of their number
            self._wake_up(push.worker)
        return await self._answer(push.worker, push.step)

    async def snapshot(self, version: int, worker: str | None = None) -> dict[str, list[GroupValues]] | None:
        """Return a snapshot's groups, each as one range per shard.

        Args:
            worker: return only the groups that this worker's task uses; None for all groups.
        Returns:
            None where the server has no such snapshot, or no longer has it.
        """
        parts = [self._server.shard.snapshot(version)]
        parts += [await shard.snapshot.remote(version) for shard in self._others]
        if any(part is None for part in parts):
            return None
        names = parts[0] if worker is None else self._server.groups_of(worker)
        return {name: [part[name] for part in parts if part is not None] for name in names or ()}

    async def drain(self, number: int) -> tuple[list[StepRecord], dict[int, CompleteSnapshot], Progress]:
        """Call `ParameterServer.drain`; the number of the last call returns the last answer again."""
        return self._drained.to(number, self._server.drain)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of `ParameterServer`."""
        answer = getattr(self._server, method)(*arguments)
        self._notify_change()
        return answer

    async def _answer(self, worker: str, step: int | None = None) -> tuple[Reply, list[Refs]]:
        while (reply := self._server.reply(worker, step)) is None:
            await self._wait_for_change(worker)
        names = self._server.groups_of(worker)
        others = [shard.read.remote(names) for shard in self._others]
        return reply, [self._published.refs(names), *[await other for other in others]]

    async def _wait_for_change(self, worker: str) -> None:
        await self._waiting.setdefault(worker, asyncio.Event()).wait()

    def _notify_change(self) -> None:
        """Wake up all calls that wait for a change."""
        for worker in list(self._waiting):
            self._wake_up(worker)

    def _wake_up(self, worker: str) -> None:
        """Wake up the calls of a worker that wait for a change."""
        event = self._waiting.pop(worker, None)
        if event is not None:
            event.set()
