"""Demands of a job's workers, checked against invented clusters."""

import logging
from collections.abc import Callable

import pytest

from multitask.cluster.arithmetic import Node
from multitask.cluster.places import PlacementError, check_places, demands, equal_share
from multitask.spec.schema import JobSpec
from tests.multitask.engines.fakes import FakeCluster

MakeSpec = Callable[..., JobSpec]
ASYNC = {"name": "async"}


def cpus(spec: JobSpec, nodes: list[Node]) -> float:
    [share] = {demand.resources["CPU"] for demand in demands(spec, nodes).values()}
    return share


@pytest.mark.parametrize(
    ("cpus", "workers", "share"), [(2, 3, 0.66), (2, 2, 1.0), (64, 3, 1.0), (2, 5, 0.4), (1, 500, 0.01)]
)
def test_workers_share_the_cpus(cpus: float, workers: int, share: float) -> None:
    assert equal_share(cpus, workers) == share


def test_the_share_is_one_that_every_worker_finds_on_a_node(make_spec: MakeSpec) -> None:
    spec = make_spec({"pets": {"workers": 4}}, engine=ASYNC)
    ones = [Node({"CPU": 1.0})] * 3
    assert equal_share(3, 4) == 0.75
    assert cpus(spec, ones) == 0.5
    assert cpus(spec, [Node({"CPU": 3.0})]) == 0.75
    bound = make_spec({"pets": {"workers": 4, "labels": {"zone": "west"}}, "cars": {}}, engine=ASYNC)
    assert cpus(bound, [Node({"CPU": 40.0}), Node({"CPU": 2.0}, {"zone": "west"})]) == 0.5


def test_each_task_asks_for_its_own_resources_and_all_for_the_jobs(make_spec: MakeSpec) -> None:
    tasks = {"pets": {"resources": {"data_pets": 1}, "labels": {"zone": "west"}}, "cars": {}}
    spec = make_spec(tasks, engine=ASYNC, resources={"cpus_per_worker": 0.5, "gpus_per_worker": 0.25})
    found = demands(spec, [])
    assert found["pets"].resources == {"CPU": 0.5, "GPU": 0.25, "data_pets": 1.0}
    assert found["pets"].labels == {"zone": "west"}
    assert found["cars"].resources == {"CPU": 0.5, "GPU": 0.25}
    assert found["cars"].labels == {}


def test_what_no_node_could_hold_is_refused_with_the_arithmetic(make_spec: MakeSpec) -> None:
    plain, data = Node({"CPU": 2.0}), Node({"CPU": 2.0, "data_pets": 1.0})
    spec = make_spec({"pets": {"workers": 2, "resources": {"data_pets": 1}}, "cars": {}}, engine=ASYNC)
    with pytest.raises(PlacementError) as caught:
        check_places(FakeCluster([plain, data]), spec)
    assert "Task 'pets' needs 2 workers of 1 CPU, 1 data_pets. The cluster has room for 1 of 2" in str(caught.value)
    check_places(FakeCluster([plain, data, data]), spec)


def test_nodes_of_a_cluster_that_the_run_joins_are_waited_for(
    make_spec: MakeSpec, caplog: pytest.LogCaptureFixture
) -> None:
    spec = make_spec(engine=ASYNC, resources={"cpus_per_worker": 1.0, "start_timeout_s": 1800})
    with caplog.at_level(logging.WARNING):
        check_places(FakeCluster([Node({"CPU": 0.0})], grows=True), spec)
    assert "room for 0 of 1: 1 node with 0 CPU for 0. Waiting up to 1800 s for nodes." in caplog.text


def test_engine_local_asks_for_nothing(make_spec: MakeSpec) -> None:
    check_places(FakeCluster([]), make_spec({"pets": {"labels": {"zone": "moon"}}}, engine={"name": "local"}))
