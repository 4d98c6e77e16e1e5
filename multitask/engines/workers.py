"""The processes of task workers as Ray actors."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import ray
import torch

from multitask.cluster.logs import log_to_stderr
from multitask.data import prefetch
from multitask.data.batches import Drawn
from multitask.engines.loss import LOST, Actor
from multitask.engines.remote import RemoteServer
from multitask.job.job import Job
from multitask.worker import ONE_AT_A_TIME, train_steps

log = logging.getLogger(__name__)


class ServedWorker:
    """One task worker, whatever process it is in."""

    def __init__(self, job: Job, name: str, incarnation: int, server: Actor, shards: Sequence[Actor] = ()) -> None:
        self._job, self._name, self._incarnation = job, name, incarnation
        self._in_flight = job.spec.engine.in_flight
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

    def confirm_finished(self) -> int:
        """Once more say that the last step was made, to a server that may have been restored since.

        Returns:
            Steps made.
        """
        self._server.join((self._worker.step, self._worker.position))
        if self._worker.step == self._job.spec.steps:
            self._server.finish(self._name)
        return self._worker.step

    def answer_requests(self) -> None:
        """Hand in what is asked for after the last step, while others still train."""
        self._worker.answer_requests(self._server)

    def answer_last_requests(self) -> None:
        """Hand in what is still asked for."""
        self._worker.answer_last_requests(self._server)

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
