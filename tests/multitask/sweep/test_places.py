"""The needs of trials, compared with what the cluster has."""

from collections.abc import Callable
from typing import Any

import pytest

from multitask.cluster.arithmetic import Node
from multitask.spec.errors import SpecError
from multitask.spec.schema import JobSpec
from multitask.sweep.places import reserve, reserved

MakeSpec = Callable[..., JobSpec]
TWO_CPUS = [Node({"CPU": 2.0})]


def test_local_trials_take_a_cpu_each(make_spec: MakeSpec) -> None:
    places = reserve([make_spec()] * 5, TWO_CPUS, None, 5)

    assert places.concurrent == 2
    assert reserved(places.placed(make_spec())) == [{"CPU": 1.0}]


def test_no_more_trials_at_a_time_than_there_are(make_spec: MakeSpec) -> None:
    assert reserve([make_spec()], [Node({"CPU": 64.0})], None, 1).concurrent == 1
    # Two cores are too few for eight trials at a time, but the sweep has only two trials.
    assert reserve([make_spec()] * 2, TWO_CPUS, 8, 2).concurrent == 2


def test_trials_that_nobody_has_suggested_yet_count(make_spec: MakeSpec) -> None:
    assert reserve([make_spec()], [Node({"CPU": 64.0})], None, 20).concurrent == 20


@pytest.mark.parametrize(
    ("engine", "changes"),
    [("async", {}), ("sync", {}), ("allreduce", {}), ("async", {"resources": {"placement": "spread"}})],
)
def test_workers_share_what_their_driver_leaves(make_spec: MakeSpec, engine: str, changes: dict[str, Any]) -> None:
    spec = make_spec(engine={"name": engine}, **changes)
    places = reserve([spec] * 3, TWO_CPUS, None, 3)

    placed = places.placed(spec)

    assert places.concurrent == 1
    assert placed.resources.cpus_per_worker == 0.99
    # Ray Train, and a run that chooses places, reserve the places of their workers. If Tune reserved them too, a trial
    # would wait for itself.
    by_itself = engine == "allreduce" or changes
    assert reserved(placed) == [{"CPU": 0.01}, *([] if by_itself else [{"CPU": 0.99}] * 2)]


def test_the_share_leaves_room_for_the_trials_that_were_asked_for(make_spec: MakeSpec) -> None:
    spec = make_spec(engine={"name": "async"})
    places = reserve([spec] * 3, TWO_CPUS, 2, 3)

    assert places.concurrent == 2
    assert places.placed(spec).resources.cpus_per_worker == 0.49


@pytest.mark.parametrize(
    ("changes", "concurrent", "message"),
    [
        (
            {"engine": {"name": "async"}, "resources": {"cpus_per_worker": 1.0}},
            None,
            r"1 trial at a time. The trial's own process needs 1 worker of 0.01 CPU; Task 'pets' needs 1 worker of 1 "
            r"CPU; Task 'cars' .* room for 2 of 3: 1 node with 2 CPU for 2\. Lower what a trial takes",
        ),
        ({}, 3, r"3 trials at a time. Engine local needs 3 workers of 1 CPU. .* room for 2 of 3: .*Set concurrent: 2"),
        ({"resources": {"gpus_per_worker": 1.0}}, None, r"needs 1 worker of 1 CPU, 1 GPU\. .*1 node with 2 CPU, 0 GPU"),
        (
            {"engine": {"name": "async"}, "tasks": {"pets": {"resources": {"data_pets": 1}}}},
            2,
            r"Task 'pets' needs 2 workers of 1 CPU, 1 data_pets. The cluster has room for 0 of 2",
        ),
    ],
)
def test_a_trial_without_a_place_is_refused_with_the_arithmetic(
    make_spec: MakeSpec, changes: dict[str, Any], concurrent: int | None, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        reserve([make_spec(**changes)] * 5, TWO_CPUS, concurrent, 5)


def test_a_worker_has_to_fit_on_one_node(make_spec: MakeSpec) -> None:
    spec = make_spec(tasks={"pets": {"workers": 3}}, engine={"name": "async"}, resources={"cpus_per_worker": 1.0})

    assert reserve([spec], [Node({"CPU": 2.0}), Node({"CPU": 1.5})], None, 1).concurrent == 1
    # The nodes have enough CPUs together, but the third worker finds only half a CPU on each.
    with pytest.raises(SpecError, match=r"room for 2 of 3: 2 nodes with 1.75 CPU for 1"):
        reserve([spec], [Node({"CPU": 1.75})] * 2, None, 1)


def test_labels_say_how_many_trials_run_at_a_time(make_spec: MakeSpec) -> None:
    pets = {"pets": {"labels": {"zone": "west"}}}
    spec = make_spec(tasks=pets, engine={"name": "async"}, resources={"cpus_per_worker": 1.0})
    nodes = [Node({"CPU": 16.0}), Node({"CPU": 2.0}, {"zone": "west"})]

    assert reserve([spec] * 9, nodes, None, 9).concurrent == 2


def test_every_trial_has_to_find_room(make_spec: MakeSpec) -> None:
    wide = make_spec(tasks={"pets": {"workers": 3}}, engine={"name": "async"}, resources={"cpus_per_worker": 1.0})
    tall = make_spec(resources={"cpus_per_worker": 2.0})
    nodes = [Node({"CPU": 1.5})] * 3

    assert reserve([wide], nodes, None, 1).concurrent == 1
    # This trial takes fewer CPUs, but all on one node.
    with pytest.raises(SpecError, match="Engine local needs 1 worker of 2 CPU"):
        reserve([wide, tall], nodes, None, 2)


def test_a_trial_that_is_suggested_later_has_to_find_room_too(make_spec: MakeSpec) -> None:
    places = reserve([make_spec()], [Node({"CPU": 4.0})], None, 9)

    with pytest.raises(SpecError, match=r"4 trials at a time. Engine local needs 4 workers of 2 CPU"):
        places.placed(make_spec(resources={"cpus_per_worker": 2.0}))


def test_the_largest_trial_sets_how_many_run_at_a_time(make_spec: MakeSpec) -> None:
    specs = [make_spec(resources={"cpus_per_worker": cpus}) for cpus in (1.0, 2.0)]

    assert reserve(specs, [Node({"CPU": 4.0})], None, 2).concurrent == 2
