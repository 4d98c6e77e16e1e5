"""The parameter server and its shards as Ray actors."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import ray
import torch

from multitask.engines.loss import Actor, LastAnswer, NotBegunError, begun
from multitask.engines.metrics import ServerMetrics
from multitask.engines.workers import log
from multitask.job.job import Job
from multitask.server.messages import Gradients, GroupValues, Key, Push, Reply, StepRecord
from multitask.server.parameter_server import CompleteSnapshot, ParameterServer
from multitask.server.progress import Progress
from multitask.server.shard import Shard, Update

GRACE_S = 1.0
"""How long published values stay after newer ones have taken their place: Ray was seen to free some that an answer
carried before its reader had said that it holds them."""
Refs = dict[str, "ray.ObjectRef[GroupValues]"]
"""Group -> one shard's range of its values, in the object store."""


class _Published:
    """A shard's values in the object store: one copy for all who read them, until they change."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._refs: dict[str, tuple[int, ray.ObjectRef[GroupValues]]] = {}
        self._earlier: deque[tuple[float, ray.ObjectRef[GroupValues]]] = deque()

    def refs(self, names: Iterable[str]) -> Refs:
        now = time.monotonic()
        while self._earlier and now - self._earlier[0][0] > GRACE_S:
            self._earlier.popleft()
        for name in names:
            group = self._shard.groups[name]
            if self._refs.get(name, (-1, None))[0] != group.updates:
                if name in self._refs:
                    self._earlier.append((now, self._refs[name][1]))
                self._refs[name] = group.updates, ray.put(group.view())
        return {name: self._refs[name][1] for name in names}


class ShardActor:
    """A shard of the server beside the first one; it is empty until `begin`."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.incarnation = time.time_ns()
        self._begun: tuple[Shard, _Published] | None = None
        self._followed = 0
        """Changes of the first shard that this one has made too."""

    def begin(self, job: Job, number: int) -> int:
        """Take the values of a job, which may be those of a checkpoint.

        Returns:
            A number that tells this process from those before it.
        """
        shard = job.make_shard(number)
        self._begun, self._followed = (shard, _Published(shard)), 0
        return self.incarnation

    def ping(self) -> int:
        return self.incarnation

    def stash(self, key: Key, gradients: Gradients, names: Sequence[str]) -> str | None:
        return begun(self._begun)[0].stash(key, gradients, names)

    def follow(self, number: int, method: str, *arguments: Any) -> None:
        """Do what the first shard did. If any of it is missed, this shard's values are no longer of the server's
        version: it lets them go and is as one that was started again, so that all go back together.

        Args:
            number: counts from 1.
        """
        shard, _ = begun(self._begun)
        self._followed += 1
        try:
            if number != self._followed:
                raise NotBegunError(f"Change {number} of its values came when {self._followed} was next.")
            getattr(shard, method)(*arguments)
        except Exception as error:
            log.warning("A shard of the server could not follow the first one: %s", error)
            self._begun, self.incarnation = None, time.time_ns()
            raise

    def read(self, names: Sequence[str]) -> Refs:
        return begun(self._begun)[1].refs(names)

    def snapshot(self, version: int) -> dict[str, GroupValues] | None:
        return begun(self._begun)[0].snapshot(version)


class _RemoteShards:
    """The other shards, told and not waited for: calls from one process arrive in order, and a shard notices one that
    does not arrive."""

    def __init__(self, shards: Sequence[Actor]) -> None:
        self._shards = shards
        self._told = 0

    def apply(self, update: Update, done: Iterable[Key]) -> None:
        self._tell("apply", update, list(done))

    def take_snapshot(self, version: int, slots: bool) -> None:
        self._tell("take_snapshot", version, slots)

    def drop_snapshot(self, version: int) -> None:
        self._tell("drop_snapshot", version)

    def _tell(self, method: str, *arguments: Any) -> None:
        self._told += 1
        for shard in self._shards:
            shard.follow.remote(self._told, method, *arguments)


class ServerActor:
    """The parameter server with its first shard; it knows nothing until `begin`.

    Not in the constructor, whose arguments Ray would keep for when it starts the process again: then there is a newer
    checkpoint, too.
    """

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._held: ParameterServer | None = None
        self._drained = LastAnswer()
        self._incarnations: list[int] | None = None
        self._changed: asyncio.Event | None = None

    def begin(self, job: Job, shards: Sequence[Actor] = (), *incarnations: int) -> None:
        """Take the values and the progress of a job, which may be those of a checkpoint.

        Args:
            shards: the other ones, which have begun with the same job.
            incarnations: what their `begin` returned.
        """
        self._others = list(shards)
        self._incarnations = [time.time_ns(), *incarnations]
        others = _RemoteShards(shards) if shards else None
        self._held = job.make_server(others=others, on_record=ServerMetrics(job).note)
        self._published = _Published(self._held.shard)

    @property
    def _server(self) -> ParameterServer:
        return begun(self._held)

    def ping(self) -> list[int]:
        """A number for this server and for each other shard as it was when this server began."""
        return begun(self._incarnations)

    async def join(self, worker: str, incarnation: int, step: int | None, position: int) -> tuple[Reply, list[Refs]]:
        self._server.join(worker, incarnation, step, position)
        return await self._answer(worker)

    async def pull(self, worker: str) -> tuple[Reply, list[Refs]]:
        return await self._answer(worker)

    async def push(self, push: Push, gradients: Gradients, *problems: str | None) -> tuple[Reply, list[Refs]]:
        while self._server.is_early(push):  # Ray starts a call when all that it carries is there, whichever came first
            await self._change()
        self._server.push(push, gradients, problems)
        # Pushes that have arrived meanwhile come first: the values are then published once for all of them.
        await asyncio.sleep(0)
        return await self._answer(push.worker, push.step)

    async def snapshot(self, version: int, worker: str | None = None) -> dict[str, list[GroupValues]] | None:
        """A version put aside: all groups, or those of a worker's task; None where it is not known (any more)."""
        parts = [self._server.shard.snapshot(version)]
        parts += [await shard.snapshot.remote(version) for shard in self._others]
        if any(part is None for part in parts):
            return None
        names = parts[0] if worker is None else self._server.groups_of(worker)
        return {name: [part[name] for part in parts if part is not None] for name in names or ()}

    async def drain(self, number: int) -> tuple[list[StepRecord], dict[int, CompleteSnapshot], Progress]:
        """As `ParameterServer.drain`; under the number of the last call, the same once more."""
        return self._drained.to(number, self._server.drain)

    async def call(self, method: str, *arguments: Any) -> Any:
        answer = getattr(self._server, method)(*arguments)
        self._notify()
        return answer

    async def _answer(self, worker: str, step: int | None = None) -> tuple[Reply, list[Refs]]:
        self._notify()
        while (reply := self._server.reply(worker, step)) is None:
            await self._change()
        names = self._server.groups_of(worker)
        others = [shard.read.remote(names) for shard in self._others]
        return reply, [self._published.refs(names), *[await other for other in others]]

    async def _change(self) -> None:
        self._changed = self._changed or asyncio.Event()
        await self._changed.wait()

    def _notify(self) -> None:
        """Let those who wait look again."""
        if self._changed is not None:
            self._changed.set()
            self._changed = None
