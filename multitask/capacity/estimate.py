"""Estimate of a job on a cluster: its step time, its images per second, and the resource that limits it.

The estimate considers each resource alone, and the one that is full first sets the pace. These are the bounds of
operational analysis, which need only means and no queueing model. They are too optimistic where two resources become
full together. Where workers wait for each other, `_round` and `_bounded_pace` follow the order of what happens.
`tests.simulation.crowd` compares the estimate with simulated runs of the server's protocol.
Source: Denning and Buzen, "The Operational Analysis of Queueing Network Models", ACM Computing Surveys 10 (1978).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod, sqrt
from statistics import NormalDist
from typing import cast

from multitask.capacity.costs import SERVER_COSTS, ServerCosts
from multitask.spec.engines import AsyncSpec, BoundedSpec, EngineSpec, SyncSpec

WORKERS, CORES, SERVER, NETWORK = "the workers", "the nodes' cores", "the server's shards", "the network"
"""Values of `Estimate.limit`: the workers' own steps, or a resource that makes them notably longer."""
LARGEST = 2**20
"""Largest factor by which a job is enlarged in search of its limit."""
NOTABLE = 1.1
"""Smallest factor that counts as notable: a limit must lengthen the step by it, and more shards must raise the images
per second by it."""
GRID = 500
"""Number of points of an integral over step times."""
SUM_COPIES = 1.0
"""Copies in memory that take as long as adding a gradient to the sum of a round, which reads two arrays and writes
one."""
STRETCHES = tuple(2**power for power in range(9))
"""Numbers of steps for which one worker may be the slowest of a job with a bound."""


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
    """Name of the resource that makes steps notably longer, or "the workers"."""
    slowdown: float
    """Factor by which the fullest resource makes a step longer."""


@dataclass(frozen=True)
class _Meeting:
    """Seconds that the push of one step takes, divided as in `ServerCosts`."""

    trip_s: float
    own_s: float = 0.0
    thread_s: float = 0.0
    check_s: float = 0.0
    cores_s: float = 0.0
    sum_s: float = 0.0
    """Time of a shard's thread to add the gradient to the sum of a round."""


def estimate(deployment: Deployment) -> Estimate:
    """Estimate how fast a job runs, and what limits it."""
    kinds, cluster = deployment.kinds, deployment.cluster
    meetings = [_meeting(kind, deployment) for kind in kinds]
    _, longest = extremes(kinds)
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
    if together and not deployment.engine.worker_group:
        server_s, network_s, busy_s = _round(deployment, meetings)
        full[SERVER], thread_load = server_s / paces[0], busy_s / paces[0]
        full[NETWORK] = max(full[NETWORK], network_s / paces[0])
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
        limit=limit if slowdown >= NOTABLE else WORKERS,
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
        check_s=costs.check.seconds(copy_s / shards),
        cores_s=costs.cores.seconds(copy_s, shards),
        sum_s=SUM_COPIES * copy_s / shards,
    )


def _round(deployment: Deployment, meetings: Sequence[_Meeting]) -> tuple[float, float, float]:
    """Return what a round takes whose pushes make one update.

    The thread of a shard checks each push when it arrives, from the first one on. When it has checked the last one, it
    adds up all gradients, makes one update and publishes the values once. Then the values leave the node one worker
    after the other, so workers begin their next steps one after the other.

    Returns:
        Seconds of a round if the thread never waits for the links; seconds of a round if the links never wait for the
        thread's checks; seconds for which the thread is busy.
    """
    kinds, cluster = deployment.kinds, deployment.cluster
    shortest, longest = extremes(kinds)

    def of_others(each: Sequence[float]) -> float:
        """Return the sum over all workers but one of the largest."""
        return sum(kind.workers * seconds for kind, seconds in zip(kinds, each, strict=True)) - max(each)

    trip_s = max(meeting.trip_s for meeting in meetings)
    checks_s = of_others([meeting.check_s for meeting in meetings])
    # With several shards the first one makes its update, and then tells the others to make theirs.
    sums_s = (1 if deployment.shards == 1 else 2) * of_others([meeting.sum_s for meeting in meetings])
    leaving = (1 - deployment.densest) / deployment.hosts
    links_s = leaving * of_others([8 * kind.pushed_bytes / (1e9 * cluster.network_gbit) for kind in kinds])
    mean_s = sum(kind.workers * kind.step_s for kind in kinds) / deployment.workers
    # The trip contains the check of the last push, and the update and the publication that are made once.
    return (
        max(longest, shortest + checks_s) + sums_s + trip_s,
        max(longest, mean_s + links_s) + sums_s + trip_s,
        checks_s + of_others([meeting.sum_s for meeting in meetings]) + max(meeting.thread_s for meeting in meetings),
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
    bound = deployment.engine.bound
    return paces if bound is None else [_bounded_pace(deployment.kinds, paces, bound - in_flight)] * len(paces)


def _bounded_pace(kinds: Sequence[Kind], paces: Sequence[float], ahead: int) -> float:
    """Return the seconds of a step of workers that wait for each other because of a bound.

    A worker may begin a step when all workers have made the step `ahead` before it. So the last step of a run ends at
    the end of a chain of steps, each of which began when the one before it in the chain ended. The chain stays with one
    worker for a stretch of steps, and goes on with a step of another worker that is `ahead` further. A stretch is the
    longest of all workers' stretches of this length, and it brings the run forward by `ahead - 1` more steps than it
    has. The length at which a step takes longest counts. Long stretches belong to the slowest kind of workers; with
    ahead = 1, stretches of one step make the round of `sync`.

    Args:
        paces: seconds of a step of each kind without a bound.
    Source: Baccelli, Cohen, Olsder and Quadrat, "Synchronization and Linearity" (1992), on the cycle times of systems
        that are linear in the algebra of max and plus. The lengths that are tried here give a bound from below.
    """

    def longest_stretch(steps: int) -> float:
        sums = [
            replace(kind, step_s=steps * pace, spread_s=sqrt(steps) * kind.spread_s)
            for kind, pace in zip(kinds, paces, strict=True)
        ]
        return extremes(sums)[1]

    return max(max(paces), *(longest_stretch(steps) / (steps + ahead - 1) for steps in STRETCHES))


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
