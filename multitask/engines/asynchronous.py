"""Engine `async`: one actor per worker around a parameter-server actor; no worker waits for another.

Source: Mudrakarta et al., "K for the Price of 1", ICLR 2019, section 5.3.
"""

import contextlib
import logging
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from multitask.data import prefetch
from multitask.data.batches import Drawn
from multitask.engines.interface import Outcome, Watch
from multitask.job import Job
from multitask.server.messages import Push, Reply, Snapshot
from multitask.spec import AsyncSpec
from multitask.worker import TrainingError, train_steps

POLL_S = 0.5
Actor = Any
"""A handle; Ray's own types differ between a class and its options."""


class ServerActor:
    """The parameter server in a process of its own."""

    def __init__(self, job: Job) -> None:
        self._server = job.make_server()

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._server, method)(*arguments)


class _Remote:
    """A server in another process."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def push(self, push: Push) -> "ray.ObjectRef[Reply]":
        return self._actor.call.remote("push", push)

    def wait(self, handle: "ray.ObjectRef[Reply]") -> Reply:
        return ray.get(handle)

    def call(self, method: str, *arguments: Any) -> Any:
        return ray.get(self._actor.call.remote(method, *arguments))


class WorkerActor:
    """One task worker in a process of its own."""

    def __init__(self, job: Job, name: str, server: Actor) -> None:
        torch.set_num_threads(job.spec.resources.threads_per_worker)
        assert isinstance(job.spec.engine, AsyncSpec)
        self._steps, self._in_flight = job.spec.steps, job.spec.engine.in_flight
        self._job, self._name = job, name
        self._server = _Remote(server)

    def place(self) -> tuple[str, int]:
        """Ray's name of this node, and this process's id."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def prepare(self, decoder: Actor | None) -> None:
        """Build the model and open the training stream.

        Args:
            decoder: the actor that decodes for several workers of this node; None decodes here.
        """
        if decoder is None:
            batches = prefetch(self._job.make_batches(self._name))
        else:
            batches = self._job.view(self._name).batches(partial(next, _drawn_ahead(decoder, self._name)))
        self._worker = self._job.make_worker(self._name, batches)

    def train(self) -> None:
        for _ in train_steps(self._worker, self._server, self._steps, self._in_flight):
            pass

    def complete(self) -> None:
        self._worker.complete(self._server)

    def private_state(self) -> dict[str, torch.Tensor]:
        """Copies of the task's private tensors as this worker holds them."""
        return {name: tensor.clone() for name, tensor in self._worker.model.private_state().items()}


class DecodeActor:
    """Decodes each image once for several workers of one node."""

    def __init__(self, job: Job, workers: Sequence[str]) -> None:
        torch.set_num_threads(1)
        self._stream = job.make_stream(workers)

    def next(self, worker: str) -> Drawn:
        return self._stream.next(worker)

    def decoded(self) -> int:
        """Batches decoded so far."""
        return self._stream.decoded


def _drawn_ahead(decoder: Actor, worker: str) -> Iterator[Drawn]:
    """A worker's batches from another process, two of them asked for ahead."""
    waiting = deque(decoder.next.remote(worker) for _ in range(2))
    while True:
        drawn = ray.get(waiting.popleft())
        waiting.append(decoder.next.remote(worker))
        yield drawn


def run(job: Job, watch: Watch) -> Outcome:
    """Train on the Ray cluster that this process is connected to, or on one started here for the run.

    Raises:
        TrainingError: a worker failed (with its name, task and traceback) or workers found no place in time.
    """
    with ray_session(), actors(job) as (server, workers):
        places = _await_start(job, {name: worker.place.remote() for name, worker in workers.items()})
        with decoders(job, {name: node for name, (node, _) in places.items()}) as decoder_of:
            preparing = {name: worker.prepare.remote(decoder_of.get(name)) for name, worker in workers.items()}
            await_all(server, preparing, job, watch)
            await_all(server, {name: worker.train.remote() for name, worker in workers.items()}, job, watch)
        await_all(server, {name: worker.complete.remote() for name, worker in workers.items()}, job, watch)
        versions: dict[str, Snapshot] = ray.get(server.call.remote("result"))
        return Outcome(versions, {name: process for name, (_, process) in places.items()})


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """Ray for a run: the session that exists, the cluster that RAY_ADDRESS names, or one in this process."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    embedded: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **embedded)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def actors(job: Job) -> Iterator[tuple[Actor, dict[str, Actor]]]:
    """The server and all workers as actors, ended with the block."""
    resources = job.spec.resources
    cpus = resources.cpus_per_worker or worker_cpus(ray.cluster_resources().get("CPU", 1.0), len(job.workers))
    shared_job = ray.put(job)
    server: Actor = ray.remote(ServerActor).options(num_cpus=0).remote(shared_job)
    actor_class: Any = ray.remote(WorkerActor).options(num_cpus=cpus, num_gpus=resources.gpus_per_worker)
    workers = {name: actor_class.remote(shared_job, name, server) for name in job.workers}
    try:
        yield server, workers
    finally:
        for actor in (*workers.values(), server):
            ray.kill(actor)


@contextlib.contextmanager
def decoders(job: Job, nodes: Mapping[str, str]) -> Iterator[dict[str, Actor]]:
    """Worker -> the actor that decodes for it, where workers on one node read the same rows; ended with the block.

    Args:
        nodes: worker -> Ray's name of its node.
    """
    shared_job = ray.put(job)
    decoder_of: dict[str, Actor] = {}
    for node in set(nodes.values()):
        for readers in job.sharing(name for name in job.workers if nodes[name] == node):
            if len(readers) > 1:
                here = NodeAffinitySchedulingStrategy(node, soft=False)
                actor: Any = ray.remote(DecodeActor).options(num_cpus=0, scheduling_strategy=here)
                decoder_of |= dict.fromkeys(readers, actor.remote(shared_job, readers))
    try:
        yield decoder_of
    finally:
        for decoder in set(decoder_of.values()):
            ray.kill(decoder)


def worker_cpus(cluster_cpus: float, workers: int) -> float:
    """CPUs that each worker asks for: an equal share rounded down to hundredths, at most one."""
    return min(1.0, max(0.01, math.floor(100 * cluster_cpus / workers) / 100))


def _await_start(job: Job, starts: Mapping[str, "ray.ObjectRef[tuple[str, int]]"]) -> dict[str, tuple[str, int]]:
    timeout_s = job.spec.resources.start_timeout_s
    _, missing = ray.wait(list(starts.values()), num_returns=len(starts), timeout=timeout_s)
    if missing:
        late = [name for name, start in starts.items() if start in missing]
        raise TrainingError(
            f"Workers {late} did not start within {timeout_s:g} s. The cluster has {ray.cluster_resources()}, "
            f"of which {ray.available_resources()} is free. Stop other jobs, or lower resources.cpus_per_worker "
            "or resources.gpus_per_worker."
        )
    return {name: _result(job, name, start) for name, start in starts.items()}


def await_all(server: Actor, calls: Mapping[str, "ray.ObjectRef[None]"], job: Job, watch: Watch) -> None:
    waiting = {call: name for name, call in calls.items()}
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=POLL_S)
        for call in done:
            _result(job, waiting.pop(call), call)
        watch(*ray.get(server.call.remote("drain")))


def _result(job: Job, worker: str, call: "ray.ObjectRef[Any]") -> Any:
    """A finished call's value; a failure names the worker and its task and carries the traceback."""
    where = f"Worker '{worker}' of task '{job.workers[worker]}'"
    try:
        return ray.get(call)
    except RayTaskError as error:
        raise TrainingError(f"{where} failed: {error.cause}\n{error}") from None
    except (RayActorError, GetTimeoutError) as error:
        raise TrainingError(f"{where} was lost: {error}") from None
