"""What `multitask plan` says of up to a thousand workers, against simulated runs of the server's protocol.

`tests.simulation.crowd` says what the runs consist of. The times are virtual, so the ratios are the same everywhere.
"""

from dataclasses import replace

import pytest

from multitask.capacity.estimate import NETWORK, SERVER, WORKERS, Deployment, Estimate, estimate
from multitask.spec.engines import AsyncSpec, BoundedSpec, EngineSpec, SyncSpec
from tests.simulation.crowd import FULL, LIGHT, Simulated, planned, simulate

ASYNC, OVERLAPPED, SHARDED = AsyncSpec(), AsyncSpec(in_flight=1), AsyncSpec(shards=4)
SYNC, SYNC_SHARDED = SyncSpec(name="sync"), SyncSpec(name="sync", shards=4)
WITHIN = 1.1
"""Largest ratio of planned and simulated steps/s, either way, where the workers' own steps set the pace."""
ABOVE = 1.25
"""Largest ratio where a resource is full or nearly full: the plan considers each resource alone, and knows no queue."""
BELOW = 0.8
"""Smallest ratio where the server is full. The server then publishes once for several pushes, and the plan counts each
push as if it were alone."""
STEPS = {1: (4, 0), 10: (30, 6), 100: (10, 2), 300: (4, 1), 1000: (4, 1)}
"""Number of workers -> steps of each, and how many of them are not measured."""


def bounded(staleness: int, in_flight: int = 0) -> BoundedSpec:
    return BoundedSpec(name="bounded", staleness=staleness, in_flight=in_flight)


def compare(job: Deployment) -> tuple[Estimate, Simulated, float]:
    """Return the plan, the run, and the ratio of their steps/s; check that each push was applied once."""
    steps, warm_up = STEPS[job.workers]
    plan, found = estimate(job), simulate(job, steps, warm_up)
    assert found.updates == (steps if job.engine.together else steps * job.workers)
    assert found.values == {float(found.updates)}
    return plan, found, plan.images_per_s / found.steps_per_s


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("network_gbit", [0.1, 25])
@pytest.mark.parametrize("name", ["async", "sync"])
def test_a_worker_alone_takes_the_time_of_the_plan(name: str, network_gbit: float, shards: int) -> None:
    """So the parts of a simulated push are those of the measured one, and what crowds show beyond comes of crowds."""
    engine = AsyncSpec(shards=shards) if name == "async" else SyncSpec(name="sync", shards=shards)
    job = planned(engine, 1, step_s=0.5, spread=0.0, network_gbit=network_gbit)
    job = replace(job, cluster=replace(job.cluster, nodes=8))

    plan, found, _ = compare(job)

    assert found.step_s == pytest.approx(plan.steps_s[0], rel=0.002)  # the plan gives each step some spread


@pytest.mark.parametrize(
    ("engine", "workers", "gap_s"),
    [
        (ASYNC, 10, LIGHT),
        (OVERLAPPED, 10, LIGHT),
        (SHARDED, 10, LIGHT),
        (SYNC, 10, LIGHT),
        (SYNC_SHARDED, 10, LIGHT),
        (bounded(2), 10, LIGHT),
        (OVERLAPPED, 100, LIGHT),
        (SHARDED, 100, LIGHT),
        (bounded(3, in_flight=1), 100, LIGHT),
        (SYNC, 100, 5 * LIGHT),
        (ASYNC, 1000, LIGHT),
        (AsyncSpec(shards=2), 1000, LIGHT),
    ],
)
def test_where_the_workers_set_the_pace(engine: EngineSpec, workers: int, gap_s: float) -> None:
    """Args:
    gap_s: mean time between two pushes, if the workers did nothing but their own steps.
    """
    job = planned(engine, workers, workers * gap_s)

    plan, found, ratio = compare(job)

    assert plan.limit == WORKERS
    assert max(plan.server_load, found.server_load) < 0.75
    assert 1 / WITHIN < ratio < WITHIN
    assert found.step_s == pytest.approx(plan.steps_s[0], rel=WITHIN - 1)
    # The server publishes less often than once for each push.
    assert BELOW * plan.server_load < found.server_load < 1.05 * plan.server_load
    link_load = 8 * plan.node_bytes_per_s / (1e9 * job.cluster.network_gbit)
    assert found.link_load == pytest.approx(link_load, rel=0.2)


@pytest.mark.parametrize(
    ("engine", "workers"),
    [
        (ASYNC, 10),
        (OVERLAPPED, 10),
        (ASYNC, 100),
        (SHARDED, 100),
        (bounded(2), 100),
        (ASYNC, 1000),
    ],
)
def test_where_the_server_is_full(engine: EngineSpec, workers: int) -> None:
    plan, found, ratio = compare(planned(engine, workers, workers * FULL))

    assert plan.limit == SERVER
    assert plan.server_load == pytest.approx(1.0)
    assert found.server_load > 0.85
    assert BELOW < ratio < 1.02


@pytest.mark.parametrize(("engine", "workers"), [(SYNC, 10), (SYNC_SHARDED, 100), (SYNC, 1000)])
def test_a_round_of_many_gradients(engine: EngineSpec, workers: int) -> None:
    plan, found, ratio = compare(planned(engine, workers, workers * FULL))

    assert plan.slowdown > 1.1
    assert 0.97 < ratio < ABOVE
    assert found.server_load == pytest.approx(plan.server_load, rel=0.15)


@pytest.mark.parametrize("engine", [ASYNC, SYNC])
def test_where_the_network_is_full(engine: EngineSpec) -> None:
    job = planned(engine, 100, 100 * LIGHT, network_gbit=1)
    job = replace(job, cluster=replace(job.cluster, nodes=100))  # a worker beside the shard would need no link

    plan, found, ratio = compare(job)

    assert plan.limit == NETWORK
    assert found.link_load > 0.75
    assert 1 / WITHIN < ratio < WITHIN


@pytest.mark.parametrize(
    ("engine", "workers", "gap_s"),
    [(ASYNC, 10, 0.013), (bounded(2), 10, 0.009), (ASYNC, 100, 0.013), (ASYNC, 100, 0.009), (SHARDED, 100, 0.008)],
)
def test_where_workers_and_server_are_both_nearly_full(engine: EngineSpec, workers: int, gap_s: float) -> None:
    _, _, ratio = compare(planned(engine, workers, workers * gap_s))

    assert BELOW < ratio < ABOVE


@pytest.mark.parametrize("shards", [2, 4])
def test_few_workers_with_many_bytes_and_several_shards_wait_longer_than_planned(shards: int) -> None:
    """A push visits the other shards before and after the first one, and at each visit it may wait for all other
    workers. The plan knows nothing of this; docs/capacity.md says so."""
    _, _, ratio = compare(planned(AsyncSpec(shards=shards), 10, 10 * FULL))

    assert 1.1 < ratio < 1.4


@pytest.mark.parametrize(("staleness", "in_flight", "workers"), [(1, 0, 10), (2, 0, 100), (3, 1, 100), (1, 0, 300)])
def test_unlike_steps_with_a_bound_wait_for_the_slowest_worker(staleness: int, in_flight: int, workers: int) -> None:
    job = planned(bounded(staleness, in_flight), workers, workers * 5 * LIGHT, spread=0.3)

    plan, _, ratio = compare(job)

    free = estimate(replace(job, engine=AsyncSpec(in_flight=in_flight)))
    assert plan.images_per_s < 0.95 * free.images_per_s, "the bound does not matter in this run"
    assert 1 / WITHIN < ratio < WITHIN
