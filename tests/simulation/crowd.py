"""Up to a thousand simulated workers around the real server, against what `multitask plan` says of them.

The server is the real one: `ServerActor` and `ShardActor` with a `ParameterServer` over one group of a few floats. Each
worker runs the real training loop (`train_steps`) with the real `RemoteServer` in a process of its own, and computes
nothing. What takes time is waited for in virtual time, as long as `multitask.capacity.costs` says of the bytes that the
planned job pushes:

- the worker, for its step (normally distributed), and for its own part of a push and its reply, half before, half after
- the thread of a shard, to check a gradient, to make an update and to publish the values. Meanwhile it does nothing
  else, so calls queue. The three parts together are `ServerCosts.thread`; they are apart, because the server makes one
  update of a round and may publish once for several pushes
- the links of nodes, which the bytes of one message pass one after the other, in each direction
- messages, which take what is left of `ServerCosts.trip`

So a worker alone takes exactly the time that was measured, and everything beyond it comes of the protocol.

python -m tests.simulation.crowd         the table of docs/capacity.md
"""

import gc
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multitask.capacity.costs import Law, fit_stages
from multitask.capacity.estimate import SUM_COPIES, Cluster, Deployment, Kind, estimate
from multitask.cluster.arithmetic import Node
from multitask.cluster.interface import OnNode, Process
from multitask.engines.remote import RemoteServer
from multitask.engines.server_actors import ServerActor, ShardActor
from multitask.job import Job
from multitask.job.groups import Group
from multitask.server.group import ParameterGroup
from multitask.server.layout import ALIGNMENT_FLOATS, Role, flatten, make_layout
from multitask.server.messages import Gradients, Key, Push, Reply
from multitask.server.progress import Progress, WorkerProgress
from multitask.server.shard import Shard, Update
from multitask.spec.engines import AsyncSpec, BoundedSpec, EngineSpec, SyncSpec
from multitask.spec.reading import load_spec
from multitask.worker import train_steps
from tests.simulation.calls import Calls
from tests.simulation.cluster import SimulatedCluster
from tests.simulation.messages import share
from tests.simulation.nodes import SimulatedNode, Timing
from tests.simulation.refs import Call, Ref
from tests.simulation.world import World

FIGURES = Path(__file__).parents[2] / "benchmarks" / "results" / "server_throughput_2cpu_2026-11-27.json"
"""The figures that `SERVER_COSTS` was fitted to."""
TASK, GROUP = "numbers", "shared:numbers"
NEVER = 10**6
"""Number of rounds that no run makes."""
WORKERS_PER_NODE = 4
COPY_BYTES_PER_S = 6e9
PUSHED_BYTES = 14_000_000
"""Bytes of a push of MobileNetV2."""


@cache
def publish_law() -> Law:
    return fit_stages(json.loads(FIGURES.read_text(encoding="utf-8")), "publish")


@dataclass(frozen=True)
class Service:
    """How long the parts of a push take, in seconds."""

    own_s: float
    check_s: float
    update_s: float
    sum_s: float
    """To add another gradient to those of the same update."""
    publish_s: float
    message_s: float
    """Of each message with gradients or values."""
    link_s: float
    """Of one shard's part of the bytes, in one direction."""

    @classmethod
    def of(cls, job: Deployment) -> "Service":
        costs, shards, (kind,) = job.costs, job.shards, job.kinds
        copy_s = kind.pushed_bytes / job.cluster.copy_bytes_per_s
        check_s, thread_s = (law.seconds(copy_s / shards) for law in (costs.check, costs.thread))
        publish_s, own_s = publish_law().seconds(copy_s / shards), costs.own.seconds(copy_s, shards)
        update_s = thread_s - check_s - publish_s
        # A trip with several shards goes to the other ones first, and they make the update after the first one.
        threads_s = thread_s if shards == 1 else thread_s + check_s + update_s
        messages_s = costs.trip.seconds(copy_s, shards) - own_s - threads_s
        assert messages_s > 0, "a trip takes longer than its parts"
        return cls(
            own_s=own_s,
            check_s=check_s,
            update_s=update_s,
            sum_s=SUM_COPIES * copy_s / shards,
            publish_s=publish_s,
            message_s=messages_s / (2 if shards == 1 else 3),
            link_s=8 * kind.pushed_bytes / shards / (1e9 * job.cluster.network_gbit),
        )


class CrowdCalls(Calls):
    """Calls, of which those with gradients take time."""

    def dispatch(self, call: Call) -> None:
        if call.method in ("push", "stash"):
            crowd: Any = self._cluster
            delay_s = crowd.service.message_s + crowd.pass_links(call.sender.node, call.actor.process.node)
            self._world.later(delay_s, super().dispatch, call)
        else:
            super().dispatch(call)


class CrowdCluster(SimulatedCluster):
    """A cluster in which threads and links are busy for as long as a push of a planned job makes them."""

    def __init__(self, world: World, job: Deployment) -> None:
        nodes = [Node({"CPU": job.cluster.cores})] * job.cluster.nodes
        super().__init__(world, nodes, timing=Timing(delay_s=0.0, start_s=0.0))
        self.calls, self.service = CrowdCalls(self), Service.of(job)
        self.busy_s: Counter[Any] = Counter()
        """Name of a process, or node and direction of a link -> seconds for which it was busy."""
        self._links: dict[tuple[SimulatedNode, str], float] = {}
        """Node and direction -> the time from which on its link is free."""

    def work(self, seconds: float) -> None:
        """Let the running thread be busy."""
        self.busy_s[self.world.here().name] += seconds
        self.world.sleep(seconds)

    def put(self, value: Any) -> Ref:
        self.work(self.service.publish_s)
        return super().put(value)

    def pass_links(self, source: SimulatedNode, target: SimulatedNode) -> float:
        """Return how long one shard's part of the bytes is on its way, with the time that it waits for links."""
        if source is target:
            return 0.0
        now, link_s = self.world.now, self.service.link_s
        ends = (source, "out"), (target, "in")
        for end in ends:
            self._links[end] = max(now, self._links.get(end, 0.0)) + link_s
            self.busy_s[end] += link_s
        return max(self._links[end] for end in ends) - now

    def _bring(self, refs: Any, process: Any) -> None:
        delays_s = [self.pass_links(ref.owner.node, process.node) for ref in refs]
        self.world.sleep(self.service.message_s + max(delays_s))


class CrowdShard(Shard):
    """A shard whose work takes virtual time."""

    cluster: CrowdCluster

    def stash(self, key: Key, gradients: Gradients, names: Any) -> str | None:
        self.cluster.work(self.cluster.service.check_s)
        return super().stash(key, gradients, names)

    def apply(self, update: Update, done: Any) -> None:
        service = self.cluster.service
        for step in update.values():
            self.cluster.work(service.update_s + (len(step.pushes) - 1) * service.sum_s)
        super().apply(update, done)


class CountingGroup(ParameterGroup):
    """A group whose values count its updates."""

    def apply(self, push: Tensor, rate: float) -> None:  # noqa: ARG002
        self.values += push
        self.updates += 1


class CrowdJob(Job):
    """A job with one task, whose workers share all tensors."""

    def __init__(self, job: Deployment, cluster: CrowdCluster) -> None:
        task = {"name": TASK, "data": "none", "method": "none", "resolution": 8, "batch_size": 1}
        content = {
            "name": "crowd",
            "backbone": {"name": "none"},
            "train_shared": True,
            "steps": NEVER,
            "evaluate_every": NEVER,
            "tasks": [task | {"workers": job.workers}],
            "optimizer": {"name": "sgd", "rate": 1.0, "momentum": 0.0},
            "checkpoints": {"every_minutes": None},
            "directory": "none",
        }
        self.spec = replace(load_spec(content), engine=job.engine)
        tensors = {"numbers": torch.zeros(ALIGNMENT_FLOATS * job.shards)}
        layout = make_layout(tensors, {"numbers": Role.PLAIN}, {})
        values, counters = flatten(tensors, layout)
        self.groups = {GROUP: Group(GROUP, (TASK,), False, True, layout, values, counters)}
        self.workers = {f"{TASK}/{rank}": TASK for rank in range(job.workers)}
        self.progress = Progress(workers={name: WorkerProgress() for name in self.workers})
        self._cluster = cluster

    def make_shard(self, number: int) -> Shard:
        shard = CrowdShard(super().make_shard(number).groups)
        shard.cluster = self._cluster
        return shard

    def _parameter_group(self, group: Group, part: tuple[int, int] | None = None) -> ParameterGroup:
        no_optimizer: Any = lambda *_: None  # noqa: E731
        return CountingGroup(group.layout, group.state(), no_optimizer, part=part)


share(CrowdCluster)
share(CrowdJob)


class CrowdWorker:
    """What the training loop asks of a worker (`TaskWorker`), without a model."""

    def __init__(self, name: str, cluster: CrowdCluster, kind: Kind, shards: int) -> None:
        self.name, self.step = name, 0
        self._cluster, self._kind = cluster, kind
        self._version = 0
        self._gradients = {GROUP: np.ones(ALIGNMENT_FLOATS * shards, np.float32)}
        self.computed: list[float] = []
        """For each step the time at which its gradient was ready."""

    def receive(self, reply: Reply, values: Any) -> None:
        pass

    def compute(self) -> tuple[Push, Gradients, dict[str, Tensor]]:
        world, kind = self._cluster.world, self._kind
        step_s = max(0.0, world.random.gauss(kind.step_s, kind.spread_s))
        self.computed.append(world.now + step_s)
        world.sleep(step_s + self._cluster.service.own_s / 2)
        self.step += 1
        push = Push(self.name, self.step - 1, self._version, loss=0.0, images=kind.images, seconds=kind.step_s)
        return push, self._gradients, {}

    def absorb(self, push: Push, private: dict[str, Tensor], reply: Reply, values: Any) -> tuple[()]:  # noqa: ARG002
        self._cluster.world.sleep(self._cluster.service.own_s / 2)
        self._version = reply.version
        return ()

    def keep_features(self) -> None:
        pass


@dataclass(frozen=True)
class Simulated:
    """What a simulated crowd did after its first steps."""

    steps_per_s: float
    """Of all workers together."""
    step_s: float
    """Mean over workers."""
    server_load: float
    """Share of the time for which the thread of the first shard would be busy if all steps were like those measured."""
    link_load: float
    """The same for the fullest link in one direction."""
    updates: int
    values: set[float]
    """All values of the first shard; each update has added a mean of ones."""


def simulate(job: Deployment, steps: int, warm_up: int, seed: int = 0) -> Simulated:
    """Let a job with one kind of workers make some steps.

    Args:
        warm_up: number of first steps that are not measured; all workers begin at the same moment, which is the worst.
    """
    assert steps > warm_up + 1
    world = World(seed, limit_s=1e9, limit_events=10**7)
    cluster = CrowdCluster(world, job)
    crowd_job = CrowdJob(job, cluster)
    workers = [CrowdWorker(name, cluster, job.kinds[0], job.shards) for name in crowd_job.workers]
    gc.disable()  # it would look at the messages of all steps, again and again, and find nothing
    try:
        cluster.run(partial(_drive, cluster, crowd_job, workers, steps))
    finally:
        gc.enable()
    (server,) = [actor for actor in cluster.actors if actor.kind is ServerActor]
    group = server.instance._held.shard.groups[GROUP]
    world.close()
    paces = [(worker.computed[-1] - worker.computed[warm_up]) / (steps - 1 - warm_up) for worker in workers]
    steps_per_s = sum(1 / pace for pace in paces)
    seconds = steps * len(workers) / steps_per_s
    # The first values leave the server too, before the first step.
    links_s = [busy_s * steps / (steps + 1) for what, busy_s in cluster.busy_s.items() if isinstance(what, tuple)]
    return Simulated(
        steps_per_s=steps_per_s,
        step_s=mean(paces),
        server_load=cluster.busy_s["server"] / seconds,
        link_load=max(links_s, default=0.0) / seconds,
        updates=group.updates,
        values=set(group.values.tolist()),
    )


def _drive(cluster: CrowdCluster, job: CrowdJob, workers: Sequence[CrowdWorker], steps: int) -> None:
    """Start the server, then all workers, and wait for their last steps."""
    world, nodes = cluster.world, cluster.places.all
    places = [Process(place=OnNode(nodes[number % len(nodes)].name)) for number in range(job.shards)]
    others = [cluster.start(ShardActor, (cluster,), place) for place in places[1:]]
    incarnations = [shard.begin.remote(job, number) for number, shard in enumerate(others, 1)]
    server = cluster.start(ServerActor, (cluster,), places[0])
    cluster.get(server.begin.remote(job, others, *incarnations))
    thread, working = world.thread(), set(job.workers)

    def train(worker: CrowdWorker) -> None:
        remote = RemoteServer(cluster, job, worker.name, 0, server, others)
        remote.join((0, 0))
        for _ in train_steps(worker, remote, steps, job.spec.engine.in_flight):
            pass
        working.discard(worker.name)
        if not working:
            world.wake(thread)

    for number, worker in enumerate(workers):
        node = nodes[-1 - number % len(nodes)]  # the first ones are not beside shards
        world.start_thread(world.start_process(worker.name, node, None), train, worker)
    world.block("the last step of all workers")


def planned(
    engine: EngineSpec,
    workers: int,
    step_s: float,
    *,
    spread: float = 0.1,
    network_gbit: float = 25.0,
    pushed_bytes: int = PUSHED_BYTES,
) -> Deployment:
    """Return a job.

    Args:
        spread: standard deviation of a step, as a part of the step.
    """
    kind = Kind(
        tasks=(TASK,),
        workers=workers,
        images=1,
        step_s=step_s,
        spread_s=spread * step_s,
        cpu_s=step_s,
        pushed_bytes=pushed_bytes,
        trained_bytes=pushed_bytes,
    )
    nodes = max(2, workers // WORKERS_PER_NODE)
    return Deployment((kind,), engine, Cluster(nodes, 2 * WORKERS_PER_NODE, network_gbit, COPY_BYTES_PER_S))


LIGHT, FULL = 0.02, 0.002
"""Seconds of a step for each worker: with so many workers as there are, a push comes after this time."""
STEPS = {10: (40, 8), 100: (15, 3), 1000: (8, 2)}
"""Number of workers -> steps of each, and how many of them are not measured."""
ENGINES: tuple[EngineSpec, ...] = (
    AsyncSpec(),
    AsyncSpec(in_flight=1),
    AsyncSpec(shards=4),
    BoundedSpec(name="bounded", staleness=2),
    SyncSpec(name="sync"),
    SyncSpec(name="sync", shards=4),
)


def cases() -> Iterator[Deployment]:
    """Return the jobs of the table."""
    for workers in STEPS:
        for engine in ENGINES:
            for gap_s in (LIGHT, FULL):
                yield planned(engine, workers, workers * gap_s)
    for engine in (AsyncSpec(), SyncSpec(name="sync")):
        yield planned(engine, 1000, 1000 * LIGHT, network_gbit=1)


def name_of(engine: EngineSpec) -> str:
    options = {"in_flight": engine.in_flight, "staleness": engine.bound}
    return ", ".join([f"`{engine.name}`", *(f"`{key}: {value}`" for key, value in options.items() if value)])


def row(job: Deployment) -> str:
    steps, warm_up = STEPS[job.workers]
    plan, found = estimate(job), simulate(job, steps, warm_up)
    columns = (
        f"{job.workers:,}",
        name_of(job.engine),
        f"{job.shards}",
        f"{job.kinds[0].step_s:g}",
        f"{job.cluster.network_gbit:g}",
        f"{plan.images_per_s:.1f}",
        f"{found.steps_per_s:.1f}",
        f"{plan.images_per_s / found.steps_per_s:.2f}",
        plan.limit,
    )
    return f"| {' | '.join(columns)} |"


def main() -> None:
    torch.set_num_threads(1)
    print("| workers | engine | shards | step s | Gbit/s | planned steps/s | simulated | ratio | limit of the plan |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for job in cases():
        print(row(job), flush=True)


if __name__ == "__main__":
    main()
