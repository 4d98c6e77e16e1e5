"""The parameter server and its workers as Ray actors."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError

from multitask.data import prefetch
from multitask.data.batches import Drawn
from multitask.engines.metrics import ServerMetrics
from multitask.job import Job
from multitask.logs import log_to_stderr
from multitask.server.messages import Gradients, GroupValues, Key, OutOfStepError, Push, Reply, StepRecord
from multitask.server.parameter_server import Completed, ParameterServer
from multitask.server.progress import Progress
from multitask.server.shard import Shard, Update
from multitask.worker import ONE_AT_A_TIME, Values, train_steps

RETRY_S = 0.2

log = logging.getLogger(__name__)


class NotBegunError(RuntimeError):
    """This process has just started, perhaps in the place of one that was lost, and has no values yet."""


GRACE_S = 1.0
"""How long published values stay after newer ones have taken their place: Ray was seen to free some that an answer
carried before its reader had said that it holds them."""
ENDED = (RayActorError, OutOfMemoryError)
"""What a call of a process meets when that is gone; the second where Ray's memory monitor has ended it."""
LOST = (*ENDED, ObjectLostError, NotBegunError)
"""What a call of the server, or a look at its values, meets when its process or node is gone."""
Actor = Any
"""A handle; Ray's own types differ between a class and its options."""
Refs = dict[str, "ray.ObjectRef[GroupValues]"]
"""Group -> one shard's range of its values, in the object store."""
Answer = TypeVar("Answer")


def begun(what: Answer | None) -> Answer:
    """What an actor has held since its `begin`."""
    if what is None:
        raise NotBegunError("Its values are still to come.")
    return what


class LastAnswer:
    """What was handed out last, for one who asks again because the answer was lost: it may have been made or not."""

    def __init__(self) -> None:
        self._number = 0
        self._answer: Any = None

    def to(self, number: int, make: Callable[[], Answer]) -> Answer:
        """Args:
        number: of the question, from 1; the same where it is asked again.
        make: gives out what it gives out once.
        """
        if number != self._number:
            self._answer = make()
            self._number = number
        answer: Answer = self._answer
        return answer


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
        self.life = time.time_ns()
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
        return self.life

    def ping(self) -> int:
        return self.life

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
            self._begun, self.life = None, time.time_ns()
            raise

    def read(self, names: Sequence[str]) -> Refs:
        return begun(self._begun)[1].refs(names)

    def kept(self, version: int) -> dict[str, GroupValues] | None:
        return begun(self._begun)[0].kept(version)


class _RemoteShards:
    """The other shards, told and not waited for: calls from one process arrive in order, and a shard notices one that
    does not arrive."""

    def __init__(self, shards: Sequence[Actor]) -> None:
        self._shards = shards
        self._told = 0

    def apply(self, update: Update, done: Iterable[Key]) -> None:
        self._tell("apply", update, list(done))

    def keep(self, version: int, slots: bool) -> None:
        self._tell("keep", version, slots)

    def release(self, version: int) -> None:
        self._tell("release", version)

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
        self._lives: list[int] | None = None
        self._changed: asyncio.Event | None = None

    def begin(self, job: Job, shards: Sequence[Actor] = (), *lives: int) -> None:
        """Take the values and the progress of a job, which may be those of a checkpoint.

        Args:
            shards: the other ones, which have begun with the same job.
            lives: what their `begin` returned.
        """
        self._others = list(shards)
        self._lives = [time.time_ns(), *lives]
        others = _RemoteShards(shards) if shards else None
        self._held = job.make_server(others=others, on_record=ServerMetrics(job).note)
        self._published = _Published(self._held.shard)

    @property
    def _server(self) -> ParameterServer:
        return begun(self._held)

    def ping(self) -> list[int]:
        """A number for this server and for each other shard as it was when this server began."""
        return begun(self._lives)

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

    async def kept(self, version: int, worker: str | None = None) -> dict[str, list[GroupValues]] | None:
        """A version put aside: all groups, or those of a worker's task; None where it is not known (any more)."""
        parts = [self._server.shard.kept(version)]
        parts += [await shard.kept.remote(version) for shard in self._others]
        if any(part is None for part in parts):
            return None
        names = parts[0] if worker is None else self._server.groups_of(worker)
        return {name: [part[name] for part in parts if part is not None] for name in names or ()}

    async def drain(self, number: int) -> tuple[list[StepRecord], dict[int, Completed], Progress]:
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


class RemoteServer:
    """The server as a worker in another process sees it; it outlives the server's process."""

    def __init__(self, job: Job, worker: str, incarnation: int, server: Actor, shards: Sequence[Actor]) -> None:
        self._server, self._shards = server, shards
        self._worker, self._incarnation = worker, incarnation
        self._names = [group.name for group in job.served() if job.workers[worker] in group.tasks]
        self._ranges = {group.name: group.layout.ranges(job.shards) for group in job.served()}
        self._timeout_s = job.spec.resources.start_timeout_s
        self._made: tuple[int, int] | None = None
        """Steps made, those included whose push is not answered yet, and the stream's position after them."""
        self._connection = 0
        """Counts the times that the server was lost: what was sent before is lost too."""
        self._joined = 0
        """The connection that knows this worker."""

    def join(self, made: tuple[int, int] | None) -> tuple[Reply, Values]:
        """Make the worker known, and pull.

        Args:
            made: steps that the private tensors which it holds have learned from, and the position after them; None
                if it holds none and has just started.
        """
        step, position = made or (None, 0)
        reply, values = self._retry(
            lambda: _take([self._server.join.remote(self._worker, self._incarnation, step, position)])
        )
        self._made = made or (reply.step, reply.position)
        self._joined = self._connection
        return reply, values

    def pull(self, worker: str) -> tuple[Reply, Values]:
        return self._retry(lambda: _take([self._server.pull.remote(worker)]))

    def push(self, push: Push, gradients: Gradients) -> tuple[int, list["ray.ObjectRef[Any]"]]:
        if self._joined != self._connection:
            # The values that these gradients were computed on are lost; the server stands at a version before them.
            reply, _ = self.join(self._made)
            push = replace(push, version=min(push.version, reply.version))
        self._made = push.step + 1, push.position
        parts: list[Gradients] = [
            {name: gradient[slice(*self._ranges[name][number])] for name, gradient in gradients.items()}
            for number in range(1 + len(self._shards))
        ]
        parts = [{name: gradient for name, gradient in part.items() if gradient.size} for part in parts]
        problems = [
            shard.stash.remote(push.key, part, self._names) for shard, part in zip(self._shards, parts[1:], strict=True)
        ]
        return self._connection, [self._server.push.remote(push, parts[0], *problems)]

    def wait(self, handle: tuple[int, list["ray.ObjectRef[Any]"]]) -> tuple[Reply, Values]:
        connection, answer = handle
        if connection == self._connection:
            try:
                return _take(answer)
            except (*LOST, OutOfStepError):  # a restored server may get what was meant for the one before it
                self._connection += 1
        # The pushes that were on their way may have been applied or not; none is sent again.
        return self.join(self._made) if self._joined != self._connection else self.pull(self._worker)

    def kept(self, version: int, worker: str) -> Values | None:
        return self._retry(lambda: ray.get(self._server.kept.remote(version, worker)))

    def call(self, method: str, *arguments: Any) -> Any:
        return self._retry(lambda: ray.get(self._server.call.remote(method, *arguments)))

    def _retry(self, ask: Callable[[], Answer]) -> Answer:
        """Ask until the server answers: after a loss it takes seconds to come back."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                return ask()
            except LOST:
                self._connection += 1
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_S)


_TAKING = threading.Lock()


def _take(answer: list["ray.ObjectRef[Any]"]) -> tuple[Reply, Values]:
    """Wait for an answer, and fetch the values that it names.

    Workers that share a process take theirs one after another. When the last reference of a process to an object goes,
    Ray (2.60.0) forgets it in two steps; a reference that another thread receives between the two is forgotten with it,
    and its `get` never ends. So all references, the answer's own too, go before another thread receives any.

    Args:
        answer: the only reference to it; taken out.
    """
    ray.wait(answer)
    with _TAKING:
        reply, shards = ray.get(answer.pop())
        names = list(shards[0])
        found = iter(ray.get([refs[name] for name in names for refs in shards]))
        values = {name: [next(found) for _ in shards] for name in names}
        del shards
    return reply, values


class ServedWorker:
    """One task worker, whatever process it is in."""

    def __init__(self, job: Job, name: str, incarnation: int, server: Actor, shards: Sequence[Actor] = ()) -> None:
        self._job, self._name, self._incarnation = job, name, incarnation
        self._in_flight = getattr(job.spec.engine, "in_flight", 0)
        self._server = RemoteServer(job, name, incarnation, server, shards)
        about: dict[str, object] = {"run": job.spec.name, "task": job.workers[name], "worker": name}
        self.about: Callable[[], dict[str, object]] = lambda: about
        """What a line of the log says of itself."""
        self.dismissed = False
        """Another process makes this worker's steps now."""

    def node(self) -> str:
        """Ray's name of this node."""
        name: str = ray.get_runtime_context().get_node_id()
        return name

    def prepare(self, decoder: Actor | None = None) -> None:
        """Build the model and open the training stream.

        Args:
            decoder: the actor that decodes for several workers of this node; None decodes here.
        """
        start = self._job.start_of(self._name)
        holds_private = self._job.holds_private(self._name)
        reply, _ = self._server.join(start if holds_private else None)
        if not holds_private:  # nothing is lost with this worker's process: it goes on where the server stands
            start = reply.step, reply.position
        if decoder is None:
            batches = prefetch(self._job.make_batches(self._name, start[1]))
        else:
            drawn = _drawn_ahead(decoder, self._job, self._name)
            batches = self._job.view(self._name).batches(partial(next, drawn))
        with ONE_AT_A_TIME:  # a network's structure comes with random numbers
            self._worker = self._job.make_worker(self._name, batches, start, self._incarnation)
        about, worker = self.about(), self._worker
        self.about = lambda: {**about, "step": worker.step}

    def train(self) -> None:
        log.info("Trains to step %d.", self._job.spec.steps, extra=self.about())
        for _ in train_steps(self._worker, self._server, self._job.spec.steps, self._in_flight):
            if self.dismissed:
                return

    def settle(self) -> int:
        """Once more say that the last step was made, to a server that may have been restored since.

        Returns:
            Steps made.
        """
        self._server.join((self._worker.step, self._worker.position))
        if self._worker.step == self._job.spec.steps:
            self._server.call("finish", self._name)
        return self._worker.step

    def answer_cuts(self) -> None:
        """Hand in what is asked for after the last step, while others still train."""
        self._worker.answer_cuts(self._server)

    def complete(self) -> None:
        """Hand in what is still asked for."""
        self._worker.complete(self._server)

    def catch_up(self, phases: Sequence[str]) -> Any:
        """For a process that takes another's place: everything up to the last of these methods, in order."""
        return [getattr(self, phase)() for phase in phases][-1]

    def private_state(self) -> dict[str, torch.Tensor]:
        """Copies of the task's private tensors as this worker holds them."""
        return {name: tensor.clone() for name, tensor in self._worker.model.private_state().items()}


class WorkerActor(ServedWorker):
    """The process of a worker, and for as long as they have none of their own, of others of its task: its guests.

    They train in threads of their own, one at a time where they compute, each with a model of its own.
    """

    def __init__(self, job: Job, name: str, incarnation: int, server: Actor, shards: Sequence[Actor] = ()) -> None:
        torch.set_num_threads(job.spec.resources.threads_per_worker)
        super().__init__(job, name, incarnation, server, shards)
        self._server_and_shards = server, shards
        self._guests: dict[str, ServedWorker] = {}
        of_all = {"run": job.spec.name, "task": job.workers[name]}
        log_to_stderr(lambda: of_all if self._guests else self.about())

    def host(self, name: str, incarnation: int, method: str, *arguments: Any) -> Any:
        """Call a method of a guest, which begins with the first call."""
        if name not in self._guests:
            self._guests[name] = ServedWorker(self._job, name, incarnation, *self._server_and_shards)
        return getattr(self._guests[name], method)(*arguments)

    def dismiss(self, name: str) -> None:
        """Let a guest go, whose steps another process makes now: its model takes memory."""
        self._guests.pop(name).dismissed = True


class DecodeActor:
    """Decodes each image once for several workers of one node."""

    def __init__(self, job: Job, workers: Sequence[str]) -> None:
        torch.set_num_threads(1)
        log_to_stderr(lambda: {"run": job.spec.name})
        self._stream = job.make_stream(workers)

    def next(self, worker: str) -> Drawn:
        return self._stream.next(worker)

    def decoded(self) -> int:
        """Batches decoded so far."""
        return self._stream.decoded


def _drawn_ahead(decoder: Actor, job: Job, worker: str) -> Iterator[Drawn]:
    """A worker's batches from another process, two of them asked for ahead; if it is lost, from a stream of its own."""
    waiting = deque(decoder.next.remote(worker) for _ in range(2))
    position = job.start_of(worker)[1]
    try:
        while True:
            drawn: Drawn = ray.get(waiting.popleft())
            waiting.append(decoder.next.remote(worker))
            position = drawn.position
            yield drawn
    except LOST:
        stream = job.make_stream([worker])
        stream.seek(worker, position)
        while True:
            yield stream.next(worker)
