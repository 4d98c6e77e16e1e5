"""What a job would do on a cluster, on paper: step time, images/s, and what is full first.

Every resource is looked at alone, and the one that is full first sets the pace: bounds of operational analysis, which
need means and no queueing model. Where two resources fill up together they promise too much.
Source: Denning and Buzen, "The Operational Analysis of Queueing Network Models", ACM Computing Surveys 10 (1978).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from statistics import NormalDist, median
from typing import Any

import numpy as np

from multitask.job.rules import applies_together
from multitask.spec.schema import AllreduceSpec, BoundedSpec, EngineSpec, LocalSpec

WORKERS, CORES, SERVER, NETWORK = "the workers", "the nodes' cores", "the server's shards", "the network"
"""What sets the pace: the workers' own steps, or a resource that is full."""
FLOAT_BYTES = 4
LARGEST = 2**20
"""Times a job is enlarged in search of its limit."""
NOTABLE = 1.1
"""A limit makes itself felt when steps take so many times as long, and shards are worth it that gain so many times."""
GRID = 500
"""Points of an integral over step times."""


@dataclass(frozen=True)
class Law:
    """Seconds for a push and its answer: so much for each shard, and so many copies of the bytes in memory."""

    shard_s: float
    copies: float

    def seconds(self, copy_s: float, shards: int = 1) -> float:
        return self.shard_s * shards + self.copies * copy_s


@dataclass(frozen=True)
class ServerCosts:
    """What a push costs."""

    trip: Law
    """From a gradient in the worker's hands to the new values there, with nobody else at the server."""
    own: Law
    """The part of it in which the worker itself is busy: it puts gradients, maps and copies values."""
    thread: Law
    """Of one shard's thread, for its part of the bytes: look for what is not finite, update, publish."""
    cores: Law
    """Of all processes together, Ray's too, on cores that others want as well."""


# fit() of benchmarks/results/server_throughput_2cpu_2026-11-27.json, which
# `python -m benchmarks.server_throughput --out FILE` wrote; a test compares them.
SERVER_COSTS = ServerCosts(
    trip=Law(shard_s=0.01613, copies=5.617),
    own=Law(shard_s=0.004677, copies=1.854),
    thread=Law(shard_s=0.006386, copies=3.068),
    cores=Law(shard_s=0.02536, copies=8.746),
)


@dataclass(frozen=True)
class Kind:
    """Workers that make equal steps."""

    tasks: tuple[str, ...]
    workers: int
    """Of all these tasks together."""
    images: int
    """Of one worker's step."""
    step_s: float
    """Mean of a step without the server."""
    spread_s: float
    """Standard deviation of it."""
    cpu_s: float
    """Core seconds of it."""
    pushed_bytes: int
    """Of a push, and of the values that answer it."""
    trained_bytes: int
    """The same with more workers: only one that is alone at its task keeps the private tensors to itself."""


@dataclass(frozen=True)
class Cluster:
    """Nodes, all alike. Workers are spread over them evenly, and so are shards, which have cores of their own unless
    there is one node only."""

    nodes: int
    cores: float
    """Of a node, for workers."""
    network_gbit: float
    """10^9 bits a second of a node's link, each way."""
    copy_bytes_per_s: float
    """From memory to memory, by one thread."""


@dataclass(frozen=True)
class Layout:
    """A job on a cluster, under any engine but `local`."""

    kinds: tuple[Kind, ...]
    engine: EngineSpec
    cluster: Cluster
    costs: ServerCosts = SERVER_COSTS

    @property
    def workers(self) -> int:
        return sum(kind.workers for kind in self.kinds)

    @property
    def shards(self) -> int:
        return getattr(self.engine, "shards", 1)

    @property
    def hosts(self) -> int:
        """Nodes with shards."""
        return min(self.shards, self.cluster.nodes)

    @property
    def densest(self) -> float:
        """Share of all workers that the fullest node has."""
        return ceil(self.workers / self.cluster.nodes) / self.workers

    def times(self, factor: int) -> "Layout":
        """So many times the workers on so many times the nodes."""
        if factor == 1:
            return self
        kinds = [replace(kind, workers=factor * kind.workers, pushed_bytes=kind.trained_bytes) for kind in self.kinds]
        return replace(self, kinds=tuple(kinds), cluster=replace(self.cluster, nodes=factor * self.cluster.nodes))


@dataclass(frozen=True)
class Estimate:
    """What is to be expected of a job."""

    workers: int
    nodes: int
    steps_s: tuple[float, ...]
    """Seconds of a step, of each kind of worker."""
    images_per_s: float
    efficiency: float
    """Images/s over those of workers that share nothing and have cores enough."""
    wait_s: float
    """A worker's mean wait for the slowest one of its round (`sync`, `allreduce`)."""
    server_load: float
    """Share of the time in which a shard's thread is busy."""
    server_cores: float
    """What the shards of a node take of its cores."""
    node_bytes_per_s: float
    """Over the link of the busiest node, each way."""
    limit: str
    """What sets the pace."""
    slowdown: float
    """How many times as long it makes a step."""


@dataclass(frozen=True)
class _Meeting:
    """Seconds in which the gradients of one worker's step meet those of others."""

    trip_s: float
    own_s: float = 0.0
    thread_s: float = 0.0
    cores_s: float = 0.0


def estimate(layout: Layout) -> Estimate:
    """How fast a job runs, and why not faster."""
    kinds, cluster = layout.kinds, layout.cluster
    meetings = [_meeting(kind, layout) for kind in kinds]
    shortest, longest = extremes(kinds)
    together = applies_together(layout.engine)
    if together:
        paces = [longest + max(meeting.trip_s for meeting in meetings)] * len(kinds)
    else:
        paces = _paces_alone(layout, meetings)

    def a_second(amounts: Sequence[float]) -> float:
        """Of something that each worker's step takes, by all workers, while nothing is full."""
        return sum(kind.workers * amount / pace for kind, amount, pace in zip(kinds, amounts, paces, strict=True))

    thread_load = a_second([meeting.thread_s for meeting in meetings])
    at_server = a_second([meeting.cores_s - meeting.own_s for meeting in meetings])
    at_workers = a_second([kind.cpu_s + meeting.own_s for kind, meeting in zip(kinds, meetings, strict=True)])
    node_bytes = _node_bytes(layout, paces[0], a_second([kind.pushed_bytes for kind in kinds]))
    alone = cluster.nodes == 1
    full = {
        CORES: (at_workers * layout.densest + (at_server if alone else 0.0)) / cluster.cores,
        SERVER: thread_load,
        NETWORK: 8 * node_bytes / (1e9 * cluster.network_gbit),
    }
    if together:
        # The server begins with the first push of a round, and the last one finds it busy with all others.
        waiting = sum(kind.workers * meeting.thread_s for kind, meeting in zip(kinds, meetings, strict=True))
        waiting -= max(meeting.thread_s for meeting in meetings)
        full[SERVER] = (paces[0] - longest + shortest + waiting) / paces[0]
    limit = max(full, key=lambda resource: full[resource])
    slowdown = max(1.0, full[limit])
    images_per_s = a_second([kind.images for kind in kinds]) / slowdown
    mean_s = sum(kind.workers * kind.step_s for kind in kinds) / layout.workers
    return Estimate(
        workers=layout.workers,
        nodes=cluster.nodes,
        steps_s=tuple(slowdown * pace for pace in paces),
        images_per_s=images_per_s,
        efficiency=images_per_s / sum(kind.workers * kind.images / kind.step_s for kind in kinds),
        wait_s=longest - mean_s if together else 0.0,
        server_load=thread_load / slowdown,
        server_cores=at_server / layout.hosts / slowdown,
        node_bytes_per_s=node_bytes / slowdown,
        limit=limit if slowdown > 1 else WORKERS,
        slowdown=slowdown,
    )


def _meeting(kind: Kind, layout: Layout) -> _Meeting:
    cluster, costs, shards = layout.cluster, layout.costs, layout.shards
    copy_s = kind.pushed_bytes / cluster.copy_bytes_per_s
    link_s = 8 * kind.pushed_bytes / (1e9 * cluster.network_gbit) if cluster.nodes > 1 else 0.0
    if isinstance(layout.engine, AllreduceSpec):
        # A byte that is sent is copied at least once. What leaves during the backward pass is not counted as hidden.
        return _Meeting(_ring_share(layout) * max(copy_s, link_s))
    return _Meeting(
        trip_s=costs.trip.seconds(copy_s, shards) + 2 * link_s,
        own_s=costs.own.seconds(copy_s, shards),
        thread_s=costs.thread.seconds(copy_s / shards),
        cores_s=costs.cores.seconds(copy_s, shards),
    )


def _ring_share(layout: Layout) -> float:
    """How often a worker's bytes pass its link in a ring all_reduce: 2 (K - 1) / K of K workers.

    Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", J. Parallel Distrib. Comput. 69 (2009).
    """
    return 2 * (layout.workers - 1) / layout.workers


def _paces_alone(layout: Layout, meetings: Sequence[_Meeting]) -> list[float]:
    """Seconds of a step of each kind where nobody waits for a round, and nothing is full."""
    in_flight = getattr(layout.engine, "in_flight", 0)
    paces = [
        max(kind.step_s + meeting.own_s, meeting.trip_s) if in_flight else kind.step_s + meeting.trip_s
        for kind, meeting in zip(layout.kinds, meetings, strict=True)
    ]
    # In the long run nobody is faster than the slowest by more than the bound.
    return [max(paces)] * len(paces) if isinstance(layout.engine, BoundedSpec) else paces


def _node_bytes(layout: Layout, round_s: float, pushed_per_s: float) -> float:
    """Bytes a second over the link of a node with shards and the most workers, each way."""
    if isinstance(layout.engine, AllreduceSpec):
        largest = max(kind.pushed_bytes for kind in layout.kinds)
        return _ring_share(layout) * largest / round_s if layout.cluster.nodes > 1 else 0.0
    here, held = layout.densest, 1 / layout.hosts
    # Pushes that come from elsewhere to its shards, values that come from elsewhere to its workers; and back.
    return pushed_per_s * (held * (1 - here) + here * (1 - held))


def extremes(kinds: Sequence[Kind]) -> tuple[float, float]:
    """Expected shortest and longest of one step of every worker, each drawn from a normal distribution, in seconds."""
    # A thousandth of spread at least: a distribution of one value has no curve.
    curves = [(NormalDist(kind.step_s, max(kind.spread_s, kind.step_s / 1000)), kind.workers) for kind in kinds]
    low = max(0.0, min(curve.mean - 6 * curve.stdev for curve, _ in curves))
    high = max(curve.mean + 6 * curve.stdev for curve, _ in curves)
    width = (high - low) / GRID
    shares = [[(curve.cdf(low + (i + 0.5) * width), count) for curve, count in curves] for i in range(GRID)]
    all_longer = sum(prod((1 - share) ** count for share, count in at) for at in shares)
    any_longer = sum(1 - prod(share**count for share, count in at) for at in shares)
    return low + width * all_longer, low + width * any_longer


def doublings(layout: Layout, workers: int) -> Iterator[Estimate]:
    """The job as it is, twice as large, and so on until it has this many workers; nodes grow with it."""
    factor = 1
    while True:
        found = estimate(layout.times(factor))
        yield found
        if found.workers >= workers:
            return
        factor *= 2


def saturation(layout: Layout) -> int | None:
    """How many times as large the job has to be for the server or the network to hold it up notably; None where that
    would be absurdly large. Nodes grow with the workers."""

    def saturated(factor: int) -> bool:
        found = estimate(layout.times(factor))
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


def best_shards(layout: Layout) -> Layout:
    """The job with its shards doubled for as long as that is worth it: every push goes to all of them."""
    if isinstance(layout.engine, AllreduceSpec | LocalSpec):
        return layout
    more = replace(layout, engine=replace(layout.engine, shards=2 * layout.shards))
    worth_it = estimate(more).images_per_s > NOTABLE * estimate(layout).images_per_s
    return best_shards(more) if worth_it else layout


def fit(figures: Mapping[str, Any]) -> ServerCosts:
    """The laws in the JSON of `benchmarks.server_throughput`, by least squares of relative errors.

    Read are its fewest and its most workers: the fewest give what one push takes, both together what it takes of the
    cores. A shard's thread is timed where it has a core to itself, beside one worker.
    """
    rows = [row for row in figures["rows"] if "GB/s" in row]
    fewest, most = (choose(row["workers"] for row in rows) for choose in (min, max))
    stages = {
        (row["model"], row["shards"]): row
        for row in figures["rows"]
        if row["table"].startswith(f"One push and pull in ms, {fewest} worker")
    }
    copies_s = copy_seconds(figures)
    points: dict[str, list[Point]] = {"trip": [], "own": [], "thread": [], "cores": []}
    for row in rows:
        stage, shards, push_s = stages[row["model"], row["shards"]], row["shards"], 1 / pushes_per_s(row, figures)
        copy_s = copies_s[row["model"]]
        if row["workers"] == fewest:
            points["trip"].append((shards, copy_s, fewest * push_s))
            points["own"].append((shards, copy_s, _seconds(stage, "put", "map", "copy")))
            points["cores"].append((shards, copy_s, row["cores"] * push_s))
            if shards == 1:
                points["thread"].append((1, copy_s, _seconds(stage, "check", "update", "publish")))
        elif row["workers"] == most:
            points["cores"].append((shards, copy_s, figures["environment"]["cores"] * push_s))
    return ServerCosts(**{name: _fit_law(found) for name, found in points.items()})


Point = tuple[int, float, float]
"""Shards, seconds of a copy, seconds measured."""


def pushes_per_s(row: Mapping[str, Any], figures: Mapping[str, Any]) -> float:
    """Of a row of `benchmarks.server_throughput`, whose bytes go up and come back."""
    floats = figures["settings"]["floats"][row["model"]]
    return float(row["GB/s"]) * 1e9 / (2 * FLOAT_BYTES * floats)


def copy_seconds(figures: Mapping[str, Any]) -> dict[str, float]:
    """Model -> seconds of one copy of its bytes in memory, in `benchmarks.server_throughput`.

    The median of all its sessions: the machine's speed changes from one to the next, and each session's pushes meet
    several speeds while its copies meet one.
    """
    sessions: dict[str, list[float]] = {}
    for row in figures["rows"]:
        if "GB/s" in row:
            sessions.setdefault(row["model"], []).append(row["ms"] / row["memcpys"] / 1000)
    return {model: median(copies) for model, copies in sessions.items()}


def _seconds(stage: Mapping[str, float], *names: str) -> float:
    return sum(stage[name] for name in names) / 1000


def _fit_law(points: Sequence[Point]) -> Law:
    taken = np.array([point[:2] for point in points])
    found = np.array([point[2] for point in points])
    shard_s, copies = np.linalg.lstsq(taken / found[:, None], np.ones(len(points)), rcond=None)[0]
    return Law(shard_s=float(shard_s), copies=float(copies))
