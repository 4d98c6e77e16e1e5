"""The actors of a run under the engines `async`, `bounded` and `sync`: the server, its shards and the workers."""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from multitask.cluster.interface import Actor, Cluster, Process, Ref, Reserved, Search
from multitask.cluster.places import chooses_places, demands, reserve
from multitask.engines.decisions import Recovery, assign_hosts, recovery, worker_to_make_room
from multitask.engines.loss import ENDED
from multitask.engines.server_actors import ServerActor, ShardActor
from multitask.engines.workers import WorkerActor
from multitask.job.checkpoint import CheckpointStore
from multitask.job.job import Job


@dataclass(frozen=True)
class StartingProcess:
    """A process that is to take over a guest, and waits for room on the cluster or is starting."""

    actor: Actor
    node: Ref[str]
    """The cluster's name of the process's node; it arrives when the process runs."""


class Crew:
    """The actors of a run.

    Each worker is in a process of its own, or is a guest in the process of its host, another worker of its task.
    """

    def __init__(self, cluster: Cluster, job: Job, store: CheckpointStore) -> None:
        self.cluster, self.job, self.store = cluster, job, store
        self.recovery = recovery(job.spec.engine.together)
        self._demands = demands(job.spec, list(cluster.nodes().values()))
        self._reserved = reserve(cluster, job.spec, self._demands)
        self.shards: list[Actor] = [self._start_server_process(ShardActor, number) for number in range(1, job.shards)]
        self.server: Actor = self._start_server_process(ServerActor, 0)
        self.hosts = assign_hosts(job.workers, {task.name: task.needed_workers for task in job.spec.tasks})
        """Worker that starts as a guest -> its host."""
        self._needed = [name for name in job.workers if name not in self.hosts]
        """Workers that need a process of their own from the start."""
        self.incarnations = dict.fromkeys(job.workers, 0)
        self._shared_job = cluster.put(job)
        self.workers = {name: self._start_worker(self._shared_job, name, 0) for name in self._needed}
        """Worker with a process of its own -> this process."""
        self._starting: dict[str, StartingProcess] = {}
        """Guest -> the process that is to take it over."""
        self._grown: dict[str, str] = {}
        """Worker that was a guest and has a process of its own now -> the cluster's name of the process's node."""

    def _start_server_process(self, kind: type, number: int) -> Actor:
        # The cluster starts no single process again where all of them start again together.
        process = Process(place=self._place(number), restarts=self.recovery is Recovery.REPLACE)
        return self.cluster.start(kind, [self.cluster], process)

    def _start_worker(self, job: Ref[Job], name: str, incarnation: int) -> Actor:
        """Start a process for a worker; every incarnation asks the cluster for the same resources."""
        task = self.job.task(self.job.workers[name])
        resources = self._demands[task.name].resources
        place: Search | Reserved
        if name in self.hosts:  # no place was reserved for this worker
            anywhere = Search.ANYWHERE if self.job.spec.resources.placement == "pack" else Search.SPREAD
            place = anywhere if chooses_places(self.job.spec) else Search.PARENT
        else:
            place = self._place(self.job.shards + self._needed.index(name))
        guests = sum(host == name for host in self.hosts.values())
        process = Process(
            place=place,
            cpus=resources["CPU"],
            gpus=resources.get("GPU", 0.0),
            resources=task.resources,
            labels=task.labels if name in self.hosts else {},
            threads=2 + guests if guests else 1,
        )
        arguments = [self.cluster, job, name, incarnation, self.server, self.shards]
        return self.cluster.start(WorkerActor, arguments, process)

    def _place(self, number: int) -> Search | Reserved:
        """Return the place of a process: its reserved one, if there is one.

        Without a reserved place the cluster looks for any place. In a trial of a sweep it looks for a worker's place,
        which needs CPUs, among the places of the trial.

        Args:
            number: counts the server's shards, and after them the workers that need a process of their own.
        """
        if number < len(self._reserved):
            return self._reserved[number]
        return Search.ANYWHERE if number < self.job.shards else Search.PARENT

    def begin(self) -> Ref[None]:
        """Hand the server and its shards the job at the latest checkpoint, or at the start if there is none."""
        job = self.cluster.put(self.job.restored(self.store.latest()))
        incarnations = [shard.begin.remote(job, number) for number, shard in enumerate(self.shards, start=1)]
        begun: Ref[None] = self.server.begin.remote(job, self.shards, *incarnations)
        return begun

    def process(self, name: str) -> Actor:
        """Return the process that a worker is in: its own, or its host's."""
        return self.workers[name if name in self.workers else self.hosts[name]]

    def call(self, name: str, method: str, *arguments: Any) -> Ref[Any]:
        """Call a method of a worker, in whichever process it is."""
        call: Ref[Any]
        if name in self.workers:
            call = getattr(self.workers[name], method).remote(*arguments)
        else:
            call = self.process(name).host.remote(name, self.incarnations[name], method, *arguments)
        return call

    def sharing_process(self, name: str) -> list[str]:
        """Return all workers in the process of a worker, itself included."""
        process = self.process(name)
        return [other for other in self.job.workers if self.process(other) == process]

    def kill_process(self, name: str) -> None:
        """End the process that a worker is in."""
        self.cluster.kill(self.process(name))

    def replace(self, name: str) -> list[str]:
        """Start another process, at the latest checkpoint, in place of a worker's lost one.

        A worker that can be a guest gets no new process, and goes on in the process of its host.

        Returns:
            All workers whose process changed: those of the lost process and, if there was too little room, one that
            became a guest again.
        """
        lost = self.sharing_process(name)
        needed = [other for other in lost if other not in self.hosts]
        moved = lost + (self._make_room(lost) if needed else [])
        for process in dict.fromkeys(self.process(other) for other in moved):
            self.cluster.kill(process)
        for other in moved:
            self.incarnations[other] += 1
            self.workers.pop(other, None)
            self._grown.pop(other, None)
        for other in needed:
            job = self.cluster.put(self.job.restored(self.store.latest()))
            self.workers[other] = self._start_worker(job, other, self.incarnations[other])
        return moved

    def _make_room(self, lost: Collection[str]) -> list[str]:
        return worker_to_make_room(lost, self._grown, self.cluster.nodes().keys(), self.job.workers)

    def grow(self, names: Collection[str]) -> dict[str, str]:
        """Look for a process for each guest among these workers, and hand over the guests whose process runs.

        The request for room stays open until a call leaves the guest out. An autoscaler sees the request and may add
        nodes. A host makes no more steps for a guest that was handed over.

        Returns:
            Worker that was handed over by this call -> the cluster's name of the node of its process.
        """
        for name in [name for name in self._starting if name not in names]:
            self.cluster.kill(self._starting.pop(name).actor)
        handed_over: dict[str, str] = {}
        for name in [name for name in self.hosts if name in names and name not in self.workers]:
            if name not in self._starting:
                actor = self._start_worker(self._shared_job, name, self.incarnations[name] + 1)
                self._starting[name] = StartingProcess(actor, actor.node.remote())
            process = self._starting[name]
            if not self.cluster.wait([process.node], timeout_s=0)[0]:
                continue
            del self._starting[name]
            with contextlib.suppress(*ENDED):  # lost while it started; the next call starts another process
                handed_over[name] = self._grown[name] = self.cluster.get(process.node)
                self.process(name).dismiss.remote(name, self.incarnations[name])
                self.workers[name] = process.actor
                self.incarnations[name] += 1
        return handed_over

    def end(self) -> None:
        """End all processes and give their places back."""
        self.grow(())
        for actor in (*self.workers.values(), self.server, *self.shards):
            self.cluster.kill(actor)
        if self._reserved:
            self.cluster.release(self._reserved[0].places)


@contextlib.contextmanager
def actors(cluster: Cluster, job: Job, store: CheckpointStore) -> Iterator[Crew]:
    """Start the server and all workers as actors, and end them with the block."""
    crew = Crew(cluster, job, store)
    try:
        yield crew
    finally:
        crew.end()
