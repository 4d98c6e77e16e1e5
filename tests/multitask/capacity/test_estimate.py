"""The estimate meets the server's measured points, and keeps the rules that every estimate has to keep."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from multitask.capacity.costs import SERVER_COSTS, Law, ServerCosts, copy_seconds, fit, pushes_per_s
from multitask.capacity.estimate import (
    CORES,
    NETWORK,
    NOTABLE,
    SERVER,
    SUM_COPIES,
    WORKERS,
    Cluster,
    Deployment,
    Kind,
    best_shards,
    doublings,
    estimate,
    extremes,
    saturation,
)
from multitask.spec.engines import AllreduceSpec, AsyncSpec, BoundedSpec, EngineSpec, LocalSpec, SyncSpec

FIGURES = Path(__file__).parents[3] / "benchmarks" / "results" / "server_throughput_2cpu_2026-11-27.json"
WITHIN = 0.16
"""Largest relative error of the server's throughput. For a job's throughput the plan promises a quarter."""
RESNET50 = 102_440_640
"""Bytes of a push."""


@cache
def figures() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8"))
    return found


def kind(**changes: Any) -> Kind:
    defaults: dict[str, Any] = {
        "tasks": ("pets",),
        "workers": 2,
        "images": 32,
        "step_s": 1.0,
        "spread_s": 0.1,
        "cpu_s": 1.0,
        "pushed_bytes": RESNET50,
        "trained_bytes": RESNET50,
    }
    return Kind(**defaults | changes)


def deployment(
    engine: EngineSpec | None = None, nodes: int = 2, cores: float = 2, gbit: float = 10, **of_kind: Any
) -> Deployment:
    return Deployment((kind(**of_kind),), engine or AsyncSpec(), Cluster(nodes, cores, gbit, copy_bytes_per_s=9e9))


def test_the_shipped_laws_are_those_of_the_shipped_figures() -> None:
    found = fit(figures())
    for name, law in vars(SERVER_COSTS).items():
        assert vars(law) == pytest.approx(vars(getattr(found, name)), rel=0.01), name
        assert min(vars(law).values()) > 0, f"{name}: a cost below nothing is no cost"


def test_the_model_meets_the_servers_points() -> None:
    """The workers only push, all on one machine. The laws were fitted to the smallest and the largest number of
    workers, and not to the others."""
    rows = [row for row in figures()["rows"] if "GB/s" in row]
    counts = sorted({row["workers"] for row in rows})
    assert (counts[0], counts[-1]) == (1, 16)
    errors = {}
    for row in rows:
        pushed = 4 * figures()["settings"]["floats"][row["model"]]
        copy_s = copy_seconds(figures())[row["model"]]
        # No work between a push and the next: a step as long as nothing.
        pushing = kind(workers=row["workers"], step_s=1e-9, spread_s=0.0, cpu_s=0.0, pushed_bytes=pushed)
        machine = Cluster(1, figures()["environment"]["cores"], 10, copy_bytes_per_s=pushed / copy_s)
        found = estimate(Deployment((pushing,), AsyncSpec(shards=row["shards"]), machine))
        planned = row["workers"] / found.steps_s[0]
        errors[row["model"], row["shards"], row["workers"]] = planned / pushes_per_s(row, figures()) - 1

    assert len(errors) == 30
    assert max(abs(error) for error in errors.values()) < WITHIN, errors
    unseen = [abs(error) for (_, _, workers), error in errors.items() if workers in counts[1:-1]]
    assert median(unseen) < 0.07


def test_the_longest_of_equal_draws_is_their_order_statistic() -> None:
    """Harter, "Expected values of normal order statistics", Biometrika 48 (1961), Table 1."""
    for count, expected in ((1, 0.0), (2, 0.56419), (5, 1.16296), (10, 1.53875), (100, 2.50759)):
        shortest, longest = extremes([kind(workers=count, step_s=10.0, spread_s=1.0)])
        assert longest == pytest.approx(10 + expected, abs=0.001)
        assert shortest == pytest.approx(10 - expected, abs=0.001)


def test_the_longest_of_unlike_workers_counts_them_all() -> None:
    draws = np.random.default_rng(0).normal([1.0] * 3 + [1.2] * 2, [0.1] * 3 + [0.05] * 2, (100_000, 5))
    kinds = [kind(workers=3), kind(workers=2, step_s=1.2, spread_s=0.05)]
    assert extremes(kinds) == pytest.approx((draws.min(1).mean(), draws.max(1).mean()), abs=0.002)


def test_a_step_with_a_push_in_flight_hides_the_trip() -> None:
    waiting, hiding = (estimate(deployment(AsyncSpec(in_flight=flying))) for flying in (0, 1))
    copy_s = RESNET50 / 9e9
    assert waiting.steps_s[0] == pytest.approx(1 + SERVER_COSTS.trip.seconds(copy_s) + 2 * 8 * RESNET50 / 10e9)
    assert hiding.steps_s[0] == pytest.approx(1 + SERVER_COSTS.own.seconds(copy_s))


def test_a_worker_alone_under_sync_is_one_under_async() -> None:
    alone, synchronous = (estimate(deployment(engine, workers=1)) for engine in (AsyncSpec(), SyncSpec(name="sync")))
    assert synchronous.steps_s == pytest.approx(alone.steps_s)
    assert synchronous.limit == WORKERS


def test_sync_waits_for_the_slower_of_two_and_adds_their_gradients() -> None:
    alone, synchronous = (estimate(deployment(engine)) for engine in (AsyncSpec(), SyncSpec(name="sync")))
    assert synchronous.wait_s == pytest.approx(0.0564, abs=1e-4)
    sum_s = SUM_COPIES * RESNET50 / 9e9
    assert synchronous.steps_s[0] - alone.steps_s[0] == pytest.approx(synchronous.wait_s + sum_s)


@pytest.mark.parametrize("shards", [1, 4])
def test_a_round_of_equal_steps_checks_and_adds_every_gradient(shards: int) -> None:
    job = deployment(SyncSpec(name="sync", shards=shards), nodes=100, workers=100, gbit=1e6, spread_s=0.0)
    copy_s = RESNET50 / 9e9
    others_s = 99 * (SERVER_COSTS.check.seconds(copy_s / shards) + min(shards, 2) * SUM_COPIES * copy_s / shards)

    found = estimate(job)

    assert found.steps_s[0] == pytest.approx(1 + others_s + SERVER_COSTS.trip.seconds(copy_s, shards), rel=0.003)
    assert found.limit == SERVER


def test_the_last_worker_of_a_round_begins_when_all_others_have_their_values() -> None:
    found = estimate(deployment(SyncSpec(name="sync"), nodes=100, workers=100, gbit=1))
    copy_s, link_s = RESNET50 / 9e9, 8 * RESNET50 / 1e9
    trip_s = SERVER_COSTS.trip.seconds(copy_s) + 2 * link_s
    assert found.steps_s[0] == pytest.approx(1 + 99 * 0.99 * link_s + 99 * SUM_COPIES * copy_s + trip_s)
    assert found.limit == NETWORK


def test_the_slowest_kind_sets_the_pace_of_a_bounded_job() -> None:
    kinds = (kind(), kind(tasks=("cars",), step_s=2.0))
    bounded = estimate(replace(deployment(BoundedSpec(name="bounded", staleness=3)), kinds=kinds))
    free = estimate(replace(deployment(), kinds=kinds))
    assert bounded.steps_s == (pytest.approx(free.steps_s[1], rel=0.01),) * 2
    assert free.steps_s[0] < free.steps_s[1]


def bounded(staleness: int, **of_kind: Any) -> Deployment:
    """Return a job whose pushes take no time."""
    none = Law(0.0, 0.0)
    job = deployment(BoundedSpec(name="bounded", staleness=staleness), pushed_bytes=0, nodes=1000, **of_kind)
    return replace(job, costs=ServerCosts(none, none, none, none, none))


def test_workers_that_may_be_one_step_ahead_wait_for_every_longest_step() -> None:
    job = bounded(1, workers=100)
    assert estimate(job).steps_s[0] == pytest.approx(extremes(job.kinds)[1])


@pytest.mark.parametrize(("staleness", "within"), [(1, 0.01), (2, 0.06), (3, 0.05), (6, 0.04)])
def test_the_pace_with_a_bound_is_that_of_random_steps(staleness: int, within: float) -> None:
    """The formula takes the best of some chains of steps, so it is never above the pace."""
    workers, steps = 200, 600
    found = estimate(bounded(staleness, workers=workers, spread_s=0.3)).steps_s[0]

    ends, last = np.zeros(workers), np.zeros(steps + 1)
    draws = np.random.default_rng(0).normal(1.0, 0.3, (steps, workers)).clip(min=0)
    for step in range(steps):
        ends = np.maximum(ends, last[max(0, step + 1 - staleness)]) + draws[step]
        last[step + 1] = ends.max()
    pace = (last[-1] - last[steps // 2]) / (steps - steps // 2)

    assert pace * (1 - within) < found < pace * 1.01


def test_workers_beyond_a_nodes_cores_share_them() -> None:
    found = estimate(deployment(nodes=1, cores=2, workers=8, gbit=1000, pushed_bytes=4))
    assert found.limit == CORES
    # Four workers for each core, and what their pushes take of it.
    assert found.steps_s[0] == pytest.approx(4 * (1 + SERVER_COSTS.cores.shard_s), rel=1e-3)


def test_a_ring_sends_twice_what_a_worker_holds() -> None:
    found = estimate(deployment(AllreduceSpec(name="allreduce"), nodes=1000, workers=1000, spread_s=0.0))
    ring_s = 2 * 0.999 * 8 * RESNET50 / 10e9
    assert found.steps_s[0] == pytest.approx(1 + ring_s, rel=0.01)
    assert found.node_bytes_per_s == pytest.approx(2 * 0.999 * RESNET50 / found.steps_s[0])
    assert (found.server_load, found.limit) == (0.0, WORKERS)


def test_no_byte_leaves_a_single_node() -> None:
    for engine in (AsyncSpec(shards=4), SyncSpec(name="sync"), AllreduceSpec(name="allreduce")):
        assert estimate(deployment(engine, nodes=1, cores=64)).node_bytes_per_s == 0


def test_a_thousand_workers_saturate_one_shard_and_more_shards_help() -> None:
    """Every worker has a node of its own, and the links carry everything."""
    start = deployment(gbit=1e6)
    factor = saturation(start)
    assert factor is not None
    full, below = estimate(start.times(factor)), estimate(start.times(factor - 1))
    assert full.limit == SERVER
    assert below.slowdown < NOTABLE <= full.slowdown
    assert full.server_load == pytest.approx(1.0)
    pushes = full.workers / full.steps_s[0]
    assert pushes * SERVER_COSTS.thread.seconds(RESNET50 / 9e9) == pytest.approx(1.0)

    largest = list(doublings(start, 1000))[-1]
    assert largest.workers == 1024
    assert largest.images_per_s == pytest.approx(32 * pushes, rel=1e-6), "nothing is gained beyond the limit"

    twice = start.times(2 * factor)
    best = best_shards(twice)
    assert best.shards > 1
    fewer, more = (
        estimate(replace(twice, engine=AsyncSpec(shards=shards))) for shards in (best.shards // 2, 2 * best.shards)
    )
    assert estimate(best).images_per_s > NOTABLE * fewer.images_per_s
    assert more.images_per_s <= NOTABLE * estimate(best).images_per_s


def test_a_slow_link_fills_before_a_shard() -> None:
    assert estimate(deployment(nodes=16, workers=16, gbit=1)).limit == NETWORK


def test_a_worker_alone_keeps_its_private_tensors_and_two_share_them() -> None:
    start = deployment(workers=1, nodes=1, pushed_bytes=0)
    assert start.times(2).kinds[0].pushed_bytes == RESNET50
    assert start.times(1) is start


ENGINES = st.one_of(
    st.builds(AsyncSpec, in_flight=st.integers(0, 1), shards=st.integers(1, 8)),
    st.builds(SyncSpec, name=st.just("sync"), shards=st.integers(1, 8)),
    st.builds(BoundedSpec, name=st.just("bounded"), staleness=st.integers(1, 8), shards=st.integers(1, 8)),
    st.builds(AllreduceSpec, name=st.just("allreduce")),
)


@st.composite
def deployments(draw: st.DrawFn) -> Deployment:
    step_s = draw(st.floats(0.01, 10))
    pushed = draw(st.integers(0, 10**9))
    one = kind(
        workers=draw(st.integers(1, 200)),
        step_s=step_s,
        spread_s=step_s * draw(st.floats(0, 0.3)),
        cpu_s=step_s * draw(st.floats(0, 4)),
        pushed_bytes=pushed,
        trained_bytes=pushed,
    )
    machine = Cluster(draw(st.integers(1, 50)), draw(st.floats(1, 64)), draw(st.floats(0.1, 400)), 9e9)
    return Deployment((one,), draw(ENGINES), machine)


def at_least(large: float, small: float) -> bool:
    return large >= small * (1 - 1e-9)


@given(deployments(), st.integers(1, 50))
def test_more_nodes_never_slow_a_job_whose_links_carry_everything(job: Deployment, more: int) -> None:
    machine = replace(job.cluster, network_gbit=float("inf"))
    larger = replace(machine, nodes=machine.nodes + more)
    here, there = (estimate(replace(job, cluster=cluster)) for cluster in (machine, larger))
    assert at_least(there.images_per_s, here.images_per_s)


@given(deployments(), st.floats(1, 100))
def test_a_faster_network_never_slows(job: Deployment, factor: float) -> None:
    faster = replace(job.cluster, network_gbit=factor * job.cluster.network_gbit)
    assert at_least(estimate(replace(job, cluster=faster)).images_per_s, estimate(job).images_per_s)


@given(deployments())
def test_twice_the_job_makes_at_most_twice_the_images(job: Deployment) -> None:
    assume(job.cluster.nodes > 1)  # a second node frees the first one's cores of the server
    assert at_least(2 * estimate(job).images_per_s, estimate(job.times(2)).images_per_s)


@given(deployments())
def test_nothing_is_more_than_full_or_faster_than_free(job: Deployment) -> None:
    found = estimate(job)
    assert found.server_load <= 1 + 1e-9
    assert 8 * found.node_bytes_per_s <= 1e9 * job.cluster.network_gbit * (1 + 1e-9)
    assert found.efficiency <= 1 + 1e-9
    assert at_least(found.steps_s[0], job.kinds[0].step_s)


@given(deployments(), st.integers(2, 16))
def test_more_shards_never_make_one_busier_at_equal_pace(job: Deployment, more: int) -> None:
    few, many = (
        estimate(replace(job, engine=AsyncSpec(shards=shards), cluster=Cluster(2, 1e9, float("inf"), 9e9)))
        for shards in (1, more)
    )
    assert at_least(few.server_load, many.server_load)


@given(deployments())
def test_waiting_for_all_is_never_faster_than_waiting_for_none(job: Deployment) -> None:
    free, together = (estimate(replace(job, engine=engine)) for engine in (AsyncSpec(), SyncSpec(name="sync")))
    assume(free.limit != SERVER)  # one update of a round is less work for a full server than one for each push
    assert at_least(free.images_per_s, together.images_per_s)


@pytest.mark.parametrize("engine", [LocalSpec(name="local"), AllreduceSpec(name="allreduce")])
def test_engines_without_shards_keep_their_deployment(engine: EngineSpec) -> None:
    start = deployment(engine)
    assert best_shards(start) is start
