"""The processes of workers as Ray actors, under the engines `async`, `bounded` and `sync`."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from multitask.cluster.interface import Actor, Cluster
from multitask.engines.decoding import batches_from
from multitask.engines.remote import RemoteServer
from multitask.job.job import Job
from multitask.worker import ONE_AT_A_TIME, train_steps

log = logging.getLogger(__name__)


class ServedWorker:
    """A worker that trains with a parameter server, in its own process or as a guest."""

    def __init__(
        self,
        cluster: Cluster,
        job: Job,
        name: str,
        incarnation: int,
        server: Actor,
        shards: Sequence[Actor] = (),
    ) -> None:
        self._cluster = cluster
        self._job, self._name, self.incarnation = job, name, incarnation
        self._in_flight = job.spec.engine.in_flight
        self._server = RemoteServer(cluster, job, name, incarnation, server, shards)
        about: dict[str, object] = {"run": job.spec.name, "task": job.workers[name], "worker": name}
        self.about: Callable[[], dict[str, object]] = lambda: about
        """Returns the fields that every line of this worker's log carries."""
        self.dismissed = False
        """Whether another process makes this worker's steps now."""

    def node(self) -> str:
        """Return the cluster's name of this process's node."""
        return self._cluster.this_node()

    # The phases of a worker, in the order in which the driver calls them.

    def prepare(self, decoder: Actor | None = None) -> None:
        """Build the model and open the training stream.

        Args:
            decoder: the actor that decodes for several workers of this node; None decodes in this process.
        """
        start = self._job.start_of(self._name)
        holds_private = self._job.holds_private(self._name)
        reply = self._server.join(start if holds_private else None)
        if not holds_private:  # the server has all that this worker learned, so the worker goes on where the server is
            start = reply.step, reply.position
        if decoder is None:
            batches = self._job.make_batches(self._name, start[1])
        else:
            drawn = batches_from(self._cluster, decoder, self._job, self._name)
            batches = self._job.view(self._name).batches(partial(next, drawn))
        with ONE_AT_A_TIME:  # building a network draws random numbers
            process = self._cluster.process_id()
            self.worker = self._job.make_worker(self._name, batches, start, self.incarnation, process)
        about, worker = self.about(), self.worker
        self.about = lambda: {**about, "step": worker.step}

    def train(self) -> None:
        """Make all steps, or all steps until a pause."""
        log.info("Trains to step %d.", self._job.steps, extra=self.about())
        for _ in train_steps(self.worker, self._server, self._job.steps, self._in_flight):
            if self.dismissed:
                return

    def confirm_finished(self) -> int:
        """Tell the server once more that this worker has made its last step: it may have been restored since.

        Returns:
            The number of steps made.
        """
        self._server.join((self.worker.step, self.worker.position))
        if self.worker.step == self._job.steps:
            self._server.finish(self._name, self.worker.step)
        return self.worker.step

    def answer_last_requests(self) -> None:
        """Answer the snapshot requests that are left when all workers have stopped."""
        self.worker.answer_last_requests(self._server)

    # Calls between the phases.

    def answer_requests(self) -> None:
        """Answer snapshot requests after the last step, while other workers still train.

        `multitask.engines.interface` describes the way of a snapshot.
        """
        self.worker.answer_requests(self._server)

    def run_phases(self, phases: Sequence[str]) -> Any:
        """Run several phases in order, in a process that takes the place of a lost one.

        Returns:
            The result of the last phase.
        """
        return [getattr(self, phase)() for phase in phases][-1]

    def private_state(self) -> dict[str, torch.Tensor]:
        """Return copies of the task's private tensors as this worker holds them."""
        return {name: tensor.clone() for name, tensor in self.worker.learner.private_state().items()}


class WorkerActor(ServedWorker):
    """The process of a worker, which also hosts other workers of its task while they have no process of their own.

    Each guest has a model and a thread of its own; only one worker of the process computes at a time.
    """

    def __init__(
        self,
        cluster: Cluster,
        job: Job,
        name: str,
        incarnation: int,
        server: Actor,
        shards: Sequence[Actor] = (),
    ) -> None:
        torch.set_num_threads(job.spec.resources.threads_per_worker)
        super().__init__(cluster, job, name, incarnation, server, shards)
        self._server_and_shards = server, shards
        self._guests: dict[str, ServedWorker] = {}
        about_task = {"run": job.spec.name, "task": job.workers[name]}
        # With guests the log cannot tell which worker a line of the process comes from.
        cluster.log_to_stderr(lambda: about_task if self._guests else self.about())

    def host(self, name: str, incarnation: int, method: str, *arguments: Any) -> Any:
        """Call a method of a guest; the first call of an incarnation creates the guest.

        A worker may become a guest again before its dismissal has arrived, because calls of a process with several
        threads may overtake each other. A call of an earlier incarnation does nothing.
        """
        guest = self._guests.get(name)
        if guest is None or guest.incarnation < incarnation:
            if guest is not None:
                self.dismiss(name, guest.incarnation)
            guest = ServedWorker(self._cluster, self._job, name, incarnation, *self._server_and_shards)
            self._guests[name] = guest
        return getattr(guest, method)(*arguments) if guest.incarnation == incarnation else None

    def dismiss(self, name: str, incarnation: int) -> None:
        """Drop a guest whose steps another process makes now, and with it the memory of its model."""
        guest = self._guests.get(name)
        if guest is not None and guest.incarnation == incarnation:
            self._guests.pop(name).dismissed = True
