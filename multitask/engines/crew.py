"""The actors of a run under the engines `async`, `bounded` and `sync`: the server, its shards and the workers."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from multitask.cluster.places import chooses_places, cluster_nodes, demands, reserve
from multitask.engines.loss import ENDED, Actor
from multitask.engines.server_actors import ServerActor, ShardActor
from multitask.engines.workers import DecodeActor, WorkerActor
from multitask.job.assignment import rank_of
from multitask.job.checkpoint import CheckpointStore
from multitask.job.job import Job
from multitask.job.rules import make_rules


class Crew:
    """The actors of a run."""

    def __init__(self, job: Job, store: CheckpointStore) -> None:
        self.job, self.store = job, store
        # Under `sync` a lost server takes everything back to the checkpoint, so there it is not started again alone.
        self.heals = not make_rules(job.spec).together
        restarts = {"num_cpus": 0, "max_restarts": -1 if self.heals else 0}
        self._demands = demands(job.spec, cluster_nodes())
        self._group = reserve(job.spec, self._demands)
        shard_class, server_class = ray.remote(ShardActor), ray.remote(ServerActor)
        self.shards: list[Actor] = [
            shard_class.options(**restarts, scheduling_strategy=self._place(number)).remote()
            for number in range(1, job.shards)
        ]
        self.server: Actor = server_class.options(**restarts, scheduling_strategy=self._place(0)).remote()
        self._worker_class: Any = ray.remote(WorkerActor)
        self.hosts = {
            name: f"{task}/{rank_of(name) % job.task(task).needed_workers}"
            for name, task in job.workers.items()
            if rank_of(name) >= job.task(task).needed_workers
        }
        """Worker that has no place from the start -> in whose process it is a guest until it has one."""
        self._placed = [name for name in job.workers if name not in self.hosts]
        self.incarnations = dict.fromkeys(job.workers, 0)
        self._shared_job = ray.put(job)
        self.workers = {name: self._start(self._shared_job, name, 0) for name in self._placed}
        """Worker -> its own process, for those that have one."""
        self._coming: dict[str, tuple[Actor, ray.ObjectRef[str]]] = {}
        """Guest -> the process that it is to have, and the node of that once it runs."""
        self._grown: dict[str, str] = {}
        """Worker that was a guest -> the node of its own process."""

    def _start(self, job: "ray.ObjectRef[Job]", name: str, incarnation: int) -> Actor:
        """A worker's process; another one that takes its place asks for the same."""
        task = self.job.task(self.job.workers[name])
        asked = self._demands[task.name].resources
        if name in self.hosts:  # its place is not one of those that were given out at the start
            spread = "DEFAULT" if self.job.spec.resources.placement == "pack" else "SPREAD"
            place: dict[str, Any] = {
                "scheduling_strategy": spread if chooses_places(self.job.spec) else None,
                "label_selector": task.labels or None,
            }
        else:
            guests = sum(host == name for host in self.hosts.values())
            place = {
                "scheduling_strategy": self._place(self.job.shards + self._placed.index(name)),
                "max_concurrency": 2 + guests if guests else 1,
            }
        starter = self._worker_class.options(
            num_cpus=asked["CPU"], num_gpus=asked.get("GPU", 0), resources=task.resources, **place
        )
        return starter.remote(job, name, incarnation, self.server, self.shards)

    def _place(self, number: int) -> Any:
        """A shard's place in the group, or a worker's, which come after them.

        Without one Ray looks for any; for the worker of a sweep's trial, which has CPUs, among the trial's own.
        """
        if self._group is not None and number < self._group.bundle_count:
            return PlacementGroupSchedulingStrategy(self._group, number)
        return "DEFAULT" if number < self.job.shards else None

    def begin(self) -> "ray.ObjectRef[None]":
        """Hand the server and its shards what the latest checkpoint has, or the start."""
        job = ray.put(self.job.restored(self.store.latest()))
        incarnations = [shard.begin.remote(job, number) for number, shard in enumerate(self.shards, start=1)]
        begun: ray.ObjectRef[None] = self.server.begin.remote(job, self.shards, *incarnations)
        return begun

    def process(self, name: str) -> Actor:
        """Where a worker is."""
        return self.workers[name if name in self.workers else self.hosts[name]]

    def call(self, name: str, method: str, *arguments: Any) -> "ray.ObjectRef[Any]":
        """Call a worker, wherever it is."""
        call: ray.ObjectRef[Any]
        if name in self.workers:
            call = getattr(self.workers[name], method).remote(*arguments)
        else:
            call = self.process(name).host.remote(name, self.incarnations[name], method, *arguments)
        return call

    def together(self, name: str) -> list[str]:
        """All workers in the process of one."""
        process = self.process(name)
        return [other for other in self.job.workers if self.process(other) == process]

    def replace(self, name: str) -> list[str]:
        """Where the process of a worker is lost, start another one, from the latest checkpoint, unless its worker can
        be a guest again.

        Returns:
            The workers that go on elsewhere: those that were in the lost process, and one that made room for another.
        """
        lost = self.together(name)
        needed = [other for other in lost if other not in self.hosts]
        moved = lost + (self._dispensable(lost) if needed else [])
        for process in {self.process(other) for other in moved}:
            ray.kill(process)
        for other in moved:
            self.incarnations[other] += 1
            self.workers.pop(other, None)
            self._grown.pop(other, None)
        for other in needed:
            job = ray.put(self.job.restored(self.store.latest()))
            self.workers[other] = self._start(job, other, self.incarnations[other])
        return moved

    def _dispensable(self, lost: Collection[str]) -> list[str]:
        """Who makes room, one of the same task if possible: nodes may be too few now for it and one that is needed."""
        tasks = {self.job.workers[name] for name in lost}
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        grown = [name for name, node in self._grown.items() if node in alive and name not in lost]
        return sorted(grown, key=lambda name: self.job.workers[name] in tasks)[-1:]

    def grow(self, names: Collection[str]) -> dict[str, str]:
        """Let Ray look for a place for each guest among these workers, and for no other (an autoscaler acts on it), and
        give those for which a process runs to it. Their hosts make no more steps of them.

        Returns:
            Worker that has its own process now -> Ray's name of the node.
        """
        for name in self._coming.keys() - set(names):
            ray.kill(self._coming.pop(name)[0])
        moved: dict[str, str] = {}
        for name in [name for name in self.hosts if name in names and name not in self.workers]:
            if name not in self._coming:
                actor = self._start(self._shared_job, name, self.incarnations[name] + 1)
                self._coming[name] = actor, actor.node.remote()
            actor, node = self._coming[name]
            if not ray.wait([node], timeout=0)[0]:
                continue
            del self._coming[name]
            with contextlib.suppress(*ENDED):  # lost while it started; another one is asked for the next time
                moved[name] = self._grown[name] = ray.get(node)
                self.process(name).dismiss.remote(name)
                self.workers[name] = actor
                self.incarnations[name] += 1
        return moved

    def end(self) -> None:
        self.grow(())
        for actor in (*self.workers.values(), self.server, *self.shards):
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)


@contextlib.contextmanager
def actors(job: Job, store: CheckpointStore) -> Iterator[Crew]:
    """The server and all workers as actors, ended with the block."""
    crew = Crew(job, store)
    try:
        yield crew
    finally:
        crew.end()


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
