"""Engine `allreduce` in real worker groups of Ray Train."""

from collections.abc import Callable

import pytest

from multitask.job import Job
from multitask.spec import JobSpec
from tests.conftest import EngineRun, run_engine

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
MakeSpec = Callable[..., JobSpec]
ALLREDUCE = {"name": "allreduce", "bucket_mb": 0.001}
ROUNDS = {"name": "local", "schedule": "rounds"}


def losses(ran: EngineRun) -> dict[tuple[str, int], float]:
    return {(record.worker, record.step): record.loss for record in ran.records}


def bits(ran: EngineRun, version: str = "last") -> dict[str, bytes]:
    groups = ran.outcome.versions[version].groups
    return {name: group.values.tobytes() + group.counters.tobytes() for name, group in groups.items()}


@pytest.mark.parametrize("tasks", [{"pets": {"workers": 2}}, {"pets": {"weight": 2.0}, "cars": {}}])
def test_two_workers_equal_local_by_rounds_bit_for_bit(make_spec: MakeSpec, tasks: dict) -> None:
    changes = {"steps": 50, "evaluate_every": 25, "schedule": {"name": "cosine"}}
    local = run_engine(Job(make_spec(tasks, engine=ROUNDS, **changes)))
    ran = run_engine(Job(make_spec(tasks, engine=ALLREDUCE, **changes)))

    assert losses(ran) == losses(local)
    assert len(losses(ran)) == 100
    for version in ("best", "last"):
        assert bits(ran, version) == bits(local, version)
        assert ran.outcome.versions[version].metrics == local.outcome.versions[version].metrics
    assert ran.outcome.versions["last"].version == 50
    assert set(ran.outcome.processes) == set(ran.job.workers)
