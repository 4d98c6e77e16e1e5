"""Engine `allreduce` in real worker groups of Ray Train."""

import os
import signal
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import ray
from ray.util import placement_group, placement_group_table, remove_placement_group

from benchmarks._processes import own_actors
from multitask.cluster.places import PlacementError
from multitask.cluster.ray_cluster import RayCluster
from multitask.engines import allreduce, decisions
from multitask.engines.allreduce import AllreduceRun, rank_group
from multitask.engines.interface import Driver, Outcome
from multitask.errors import TrainingError
from multitask.job.job import Job
from multitask.server.messages import Evaluation, StepRecord
from multitask.spec.schema import JobSpec
from tests.conftest import EngineRun, run_engine, store_of, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
MakeSpec = Callable[..., JobSpec]
ALLREDUCE = {"name": "allreduce", "bucket_mb": 0.001}
ROUNDS = {"name": "local", "schedule": "rounds"}


@pytest.fixture(autouse=True)
def places_are_given_back(ray_cluster: None) -> Iterator[None]:  # noqa: ARG001
    yield
    # Ray Train gives the places of a group that failed back from another process.
    wait_until(lambda: {group["state"] for group in placement_group_table().values()} <= {"REMOVED"})


def losses(records: list[StepRecord]) -> dict[tuple[str, int], float]:
    return {(record.worker, record.step): record.loss for record in records}


def bits(version: Evaluation) -> dict[str, bytes]:
    return {name: group.values.tobytes() + group.counters.tobytes() for name, group in version.groups.items()}


def last(ran: EngineRun) -> dict[str, bytes]:
    return bits(ran.outcome.versions["last"])


def test_two_workers_equal_local_by_rounds_bit_for_bit(make_spec: MakeSpec) -> None:
    tasks = {"pets": {"weight": 2.0}, "cars": {"accumulate": 2}}
    changes = {"steps": 50, "evaluate_every": 25, "schedule": {"name": "cosine"}}
    local = run_engine(Job(make_spec(tasks, engine=ROUNDS, **changes)))
    ran = run_engine(Job(make_spec(tasks, engine=ALLREDUCE, **changes)))

    assert losses(ran.records) == losses(local.records)
    assert len(losses(ran.records)) == 100
    assert {record.staleness for record in ran.records} == {0}
    for name in ("best", "last"):
        version, expected = ran.outcome.versions[name], local.outcome.versions[name]
        assert bits(version) == bits(expected)
        assert version.metrics == expected.metrics
    assert ran.outcome.versions["last"].version == 50
    assert len({*(record.pid for record in ran.records), os.getpid()}) == 3


def test_workers_meet_all_others_for_shared_tensors_and_their_own_task_for_private_ones(make_spec: MakeSpec) -> None:
    """Three ranks in two process groups that overlap; sums of three in another order drift."""
    changes = {"steps": 10, "evaluate_every": 10, "optimizer": {"name": "sgd", "rate": 0.01}}
    tasks = {"pets": {"workers": 2}, "cars": {}}
    local = run_engine(Job(make_spec(tasks, engine=ROUNDS, **changes)))
    ran = run_engine(Job(make_spec(tasks, engine=ALLREDUCE, resources={"cpus_per_worker": 0.5}, **changes)))

    found, expected = (run.outcome.versions["last"].groups for run in (ran, local))
    assert set(found) == {"shared:pets+cars", "private:pets", "private:cars"}
    for name, group in expected.items():
        np.testing.assert_allclose(found[name].values, group.values, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.timeout(1200)
def test_who_is_killed_takes_all_back_to_the_last_checkpoint_and_no_bit_changes(make_spec: MakeSpec) -> None:
    """A rank, and once all are back, the ledger."""
    changes = {"steps": 300, "evaluate_every": 150, "checkpoints": {"every_rounds": 5}}
    local = run_engine(Job(make_spec(engine=ROUNDS, **changes)))
    job = Job(make_spec(engine=ALLREDUCE, **changes, directory=f"{local.job.spec.directory}-killed"))
    store, outcome, killed = store_of(job), Outcome(), []
    records: list[StepRecord] = []

    def watch(new: list[StepRecord], *_: object) -> None:
        records.extend(new)
        of_cars = [record.pid for record in new if record.worker == "cars/0"]
        if not of_cars or not store.where():
            return
        if not killed:
            killed.append(of_cars[-1])
        elif len(killed) == 1 and of_cars[-1] != killed[0]:
            killed.extend(own_actors("LedgerActor"))
        else:
            return
        os.kill(killed[-1], signal.SIGKILL)

    with rank_group(RayCluster(), job, store) as crew:
        AllreduceRun(job, Driver(watch, store), outcome, crew).run()

    assert len(killed) == 2
    assert len({record.pid for record in records}) == 6, "all ranks have successors, twice"
    assert len(outcome.recoveries) == 2
    assert losses(records) == losses(local.records)
    assert bits(outcome.versions["last"]) == last(local)


def test_a_worker_that_raises_ends_the_run_with_its_name_task_and_traceback(make_spec: MakeSpec) -> None:
    spec = make_spec({"pets": {}, "cars": {"std": [1e-38, 1e-38, 1e-38]}}, engine=ALLREDUCE, steps=50)

    with pytest.raises(TrainingError) as caught:
        run_engine(Job(spec))

    message = str(caught.value)
    assert "Worker 'cars/0' of task 'cars' failed" in message
    assert "the loss is nan at step 0" in message
    assert "in compute" in message


def test_a_run_that_ends_while_train_starts_a_group_leaves_no_places_behind(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decisions, "RESTARTS_WITHOUT_A_STEP", 0)
    monkeypatch.setattr(allreduce, "END_S", 300)
    killed = []

    def watch(new: list[StepRecord], *_: object) -> None:
        if new and not killed:
            killed.append(new[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    job = Job(make_spec(engine=ALLREDUCE, steps=100_000, evaluate_every=100_000))
    with pytest.raises(TrainingError, match="The worker group was lost 1 times without a step made"):
        allreduce.run(job, Driver(watch, store_of(job)))


def test_workers_whose_places_others_hold_are_named(make_spec: MakeSpec) -> None:
    spec = make_spec(engine=ALLREDUCE, resources={"cpus_per_worker": 1.0, "start_timeout_s": 20})
    others = placement_group([{"CPU": 1.0}])
    ray.get(others.ready())
    try:
        with pytest.raises(TrainingError, match=r"Workers \['pets/0', 'cars/0'\] did not start within 20 s.*'CPU': 2"):
            run_engine(Job(spec))
    finally:
        remove_placement_group(others)


def test_workers_that_no_node_could_hold_are_refused_before_train_starts(make_spec: MakeSpec) -> None:
    spec = make_spec(engine=ALLREDUCE, task_defaults={"labels": {"zone": "moon"}})
    with pytest.raises(PlacementError, match=r"on nodes labelled zone=moon\. .* room for 0 of 1: 1 node"):
        run_engine(Job(spec))
