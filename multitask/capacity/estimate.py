"""Estimate of a job on a cluster: its step time, its images per second, and the resource that limits it.

The estimate considers each resource alone, and the one that is full first sets the pace. These are the bounds of
operational analysis, which need only means and no queueing model. They are too optimistic where two resources become
full together.
Source: Denning and Buzen, "The Operational Analysis of Queueing Network Models", ACM Computing Surveys 10 (1978).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from statistics import NormalDist
from typing import cast

from multitask.capacity.costs import SERVER_COSTS, ServerCosts
from multitask.spec.engines import AsyncSpec, BoundedSpec, EngineSpec, SyncSpec

WORKERS, CORES, SERVER, NETWORK = "the workers", "the nodes' cores", "the server's shards", "the network"
"""Values of `Estimate.limit`: the workers' own steps, or a resource that is full."""
LARGEST = 2**20
"""Largest factor by which a job is enlarged in search of its limit."""
NOTABLE = 1.1
"""Smallest factor that counts as notable: a limit must lengthen the step by it, and more shards must raise the images
per second by it."""
GRID = 500
"""Number of points of an integral over step times."""


@dataclass(frozen=True)
class Kind:
    """A kind of workers: those that make equal steps."""

    tasks: tuple[str, ...]
    workers: int
    """Number of workers of these tasks together."""
    images: int
    """Number of images in one worker's step."""
    step_s: float
    """Mean seconds of a step without the server."""
    spread_s: float
    """Standard deviation of these seconds."""
    cpu_s: float
    """Mean core seconds of a step without the server."""
    pushed_bytes: int
    """Bytes of a push, and of the values in its reply."""
    trained_bytes: int
    """Bytes of a push if the task has several workers. The private tensors are then among them; the only worker of a
    task keeps them to itself."""


@dataclass(frozen=True)
class Cluster:
    """A cluster of equal nodes.

    Workers and shards are spread evenly over the nodes. Shards have cores of their own, except on a single node.
    """

    nodes: int
    cores: float
    """Number of a node's cores for workers."""
    network_gbit: float
    """Speed of a node's link in 10^9 bits per second, in each direction."""
    copy_bytes_per_s: float
    """Bytes per second that one thread copies from memory to memory."""


@dataclass(frozen=True)
class Deployment:
    """A job on a cluster, with any engine except `local`."""

    kinds: tuple[Kind, ...]
    engine: EngineSpec
    cluster: Cluster
    costs: ServerCosts = SERVER_COSTS

    @property
    def workers(self) -> int:
        return sum(kind.workers for kind in self.kinds)

    @property
    def shards(self) -> int:
        return self.engine.shards

    @property
    def hosts(self) -> int:
        """Number of nodes that have shards."""
        return min(self.shards, self.cluster.nodes)

    @property
    def densest(self) -> float:
        """Share of all workers that are on the fullest node."""
        return ceil(self.workers / self.cluster.nodes) / self.workers

    def times(self, factor: int) -> "Deployment":
        """Return the job with its workers and its nodes multiplied by a factor."""
        if factor == 1:
            return self
        kinds = [replace(kind, workers=factor * kind.workers, pushed_bytes=kind.trained_bytes) for kind in self.kinds]
        return replace(self, kinds=tuple(kinds), cluster=replace(self.cluster, nodes=factor * self.cluster.nodes))


@dataclass(frozen=True)
class Estimate:
    """The expected speed of a job, and its limit."""

    workers: int
    nodes: int
    steps_s: tuple[float, ...]
    """Seconds of a step of each kind of worker."""
    images_per_s: float
    efficiency: float
    """Images per second, divided by those of workers that share nothing and have enough cores."""
    wait_s: float
    """Mean seconds that a worker waits for the slowest worker of its round (`sync`, `allreduce`)."""
    server_load: float
    """Share of the time in which the thread of a shard is busy."""
    server_cores: float
    """Number of cores that the shards of a node take."""
    node_bytes_per_s: float
    """Bytes per second over the link of the busiest node, in each direction."""
    limit: str
    """Name of the limit that sets the pace: "the workers" or a resource."""
    slowdown: float
    """Factor by which the limit makes a step longer."""


@dataclass(frozen=True)
class _Meeting:
    """Seconds that the push of one step takes, divided as in `ServerCosts`."""

    trip_s: float
    own_s: float = 0.0
    thread_s: float = 0.0
    cores_s: float = 0.0


def estimate(deployment: Deployment) -> Estimate:
    """Estimate how fast a job runs, and what limits it."""
    kinds, cluster = deployment.kinds, deployment.cluster
    meetings = [_meeting(kind, deployment) for kind in kinds]
    shortest, longest = extremes(kinds)
    together = deployment.engine.together
    if together:
        paces = [longest + max(meeting.trip_s for meeting in meetings)] * len(kinds)
    else:
        paces = _paces_alone(deployment, meetings)

    def per_second(amounts: Sequence[float]) -> float:
        """Return how much all workers take per second while nothing is full, from the amount of each kind's step."""
        return sum(kind.workers * amount / pace for kind, amount, pace in zip(kinds, amounts, paces, strict=True))

    thread_load = per_second([meeting.thread_s for meeting in meetings])
    at_server = per_second([meeting.cores_s - meeting.own_s for meeting in meetings])
    at_workers = per_second([kind.cpu_s + meeting.own_s for kind, meeting in zip(kinds, meetings, strict=True)])
    node_bytes = _node_bytes(deployment, paces[0], per_second([kind.pushed_bytes for kind in kinds]))
    alone = cluster.nodes == 1
    full = {
        CORES: (at_workers * deployment.densest + (at_server if alone else 0.0)) / cluster.cores,
        SERVER: thread_load,
        NETWORK: 8 * node_bytes / (1e9 * cluster.network_gbit),
    }
    if together:
        # The server starts with the first push of a round, and the last push has to wait for all others.
        waiting = sum(kind.workers * meeting.thread_s for kind, meeting in zip(kinds, meetings, strict=True))
        waiting -= max(meeting.thread_s for meeting in meetings)
        full[SERVER] = (paces[0] - longest + shortest + waiting) / paces[0]
    limit = max(full, key=lambda resource: full[resource])
    slowdown = max(1.0, full[limit])
    images_per_s = per_second([kind.images for kind in kinds]) / slowdown
    mean_s = sum(kind.workers * kind.step_s for kind in kinds) / deployment.workers
    return Estimate(
        workers=deployment.workers,
        nodes=cluster.nodes,
        steps_s=tuple(slowdown * pace for pace in paces),
        images_per_s=images_per_s,
        efficiency=images_per_s / sum(kind.workers * kind.images / kind.step_s for kind in kinds),
        wait_s=longest - mean_s if together else 0.0,
        server_load=thread_load / slowdown,
        server_cores=at_server / deployment.hosts / slowdown,
        node_bytes_per_s=node_bytes / slowdown,
        limit=limit if slowdown > 1 else WORKERS,
        slowdown=slowdown,
    )


def _meeting(kind: Kind, deployment: Deployment) -> _Meeting:
    cluster, costs, shards = deployment.cluster, deployment.costs, deployment.shards
    copy_s = kind.pushed_bytes / cluster.copy_bytes_per_s
    link_s = 8 * kind.pushed_bytes / (1e9 * cluster.network_gbit) if cluster.nodes > 1 else 0.0
    if deployment.engine.worker_group:
        # A byte that is sent is copied at least once. Time that overlaps with the backward pass is not subtracted.
        return _Meeting(_ring_share(deployment) * max(copy_s, link_s))
    return _Meeting(
        trip_s=costs.trip.seconds(copy_s, shards) + 2 * link_s,
        own_s=costs.own.seconds(copy_s, shards),
        thread_s=costs.thread.seconds(copy_s / shards),
        cores_s=costs.cores.seconds(copy_s, shards),
    )


def _ring_share(deployment: Deployment) -> float:
    """Return how many times a worker's bytes pass its link in a ring all_reduce: 2 (K - 1) / K with K workers.

    Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", J. Parallel Distrib. Comput. 69 (2009).
    """
    return 2 * (deployment.workers - 1) / deployment.workers


def _paces_alone(deployment: Deployment, meetings: Sequence[_Meeting]) -> list[float]:
    """Return the seconds of a step of each kind, if no worker waits for a round and nothing is full."""
    in_flight = deployment.engine.in_flight
    paces = [
        max(kind.step_s + meeting.own_s, meeting.trip_s) if in_flight else kind.step_s + meeting.trip_s
        for kind, meeting in zip(deployment.kinds, meetings, strict=True)
    ]
    # With a bound, all workers are as slow as the slowest one in the long run.
    return [max(paces)] * len(paces) if deployment.engine.bound is not None else paces


def _node_bytes(deployment: Deployment, round_s: float, pushed_per_s: float) -> float:
    """Return the bytes per second in each direction over the link of a node with shards and the most workers."""
    if deployment.engine.worker_group:
        largest = max(kind.pushed_bytes for kind in deployment.kinds)
        return _ring_share(deployment) * largest / round_s if deployment.cluster.nodes > 1 else 0.0
    here, held = deployment.densest, 1 / deployment.hosts
    # Pushes from other nodes go to its shards, and values from other nodes go to its workers. The other direction has
    # equally many.
    return pushed_per_s * (held * (1 - here) + here * (1 - held))


def extremes(kinds: Sequence[Kind]) -> tuple[float, float]:
    """Return the expected shortest and longest step of a round in seconds, if all steps are normally distributed."""
    # The standard deviation is at least a thousandth of the mean, because a normal distribution needs one above 0.
    curves = [(NormalDist(kind.step_s, max(kind.spread_s, kind.step_s / 1000)), kind.workers) for kind in kinds]
    low = max(0.0, min(curve.mean - 6 * curve.stdev for curve, _ in curves))
    high = max(curve.mean + 6 * curve.stdev for curve, _ in curves)
    width = (high - low) / GRID
    shares = [[(curve.cdf(low + (i + 0.5) * width), count) for curve, count in curves] for i in range(GRID)]
    all_longer = sum(prod((1 - share) ** count for share, count in at) for at in shares)
    any_longer = sum(1 - prod(share**count for share, count in at) for at in shares)
    return low + width * all_longer, low + width * any_longer


def doublings(deployment: Deployment, workers: int) -> Iterator[Estimate]:
    """Estimate the job as it is, twice as large, and so on, until it has this many workers.

    Nodes grow with the workers.
    """
    factor = 1
    while True:
        found = estimate(deployment.times(factor))
        yield found
        if found.workers >= workers:
            return
        factor *= 2


def saturation(deployment: Deployment) -> int | None:
    """Return the smallest factor at which the server or the network slows the job down notably; None above `LARGEST`.

    Nodes grow with the workers.
    """

    def saturated(factor: int) -> bool:
        found = estimate(deployment.times(factor))
        return found.limit in (SERVER, NETWORK) and found.slowdown >= NOTABLE

    upper = 1
    while not saturated(upper):
        upper *= 2
        if upper > LARGEST:
            return None
    lower = upper // 2
    while upper - lower > 1:
        middle = (lower + upper) // 2
        lower, upper = (lower, middle) if saturated(middle) else (middle, upper)
    return upper


def best_shards(deployment: Deployment) -> Deployment:
    """Double the job's shards for as long as that is worth it.

    More shards also cost time, because every push goes to all of them.
    """
    if deployment.engine.worker_group or not deployment.engine.uses_ray:
        return deployment
    served = cast(AsyncSpec | BoundedSpec | SyncSpec, deployment.engine)
    more = replace(deployment, engine=replace(served, shards=2 * deployment.shards))
    worth_it = estimate(more).images_per_s > NOTABLE * estimate(deployment).images_per_s
    return best_shards(more) if worth_it else deployment
