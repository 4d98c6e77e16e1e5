"""What a trial needs against what the cluster has."""

from collections.abc import Callable
from typing import Any

import pytest

from multitask.spec import JobSpec, SpecError
from multitask.sweep.places import needs, reserve, reserved

MakeSpec = Callable[..., JobSpec]
TWO_CPUS = [{"CPU": 2.0}]


def test_local_trials_take_a_cpu_each(make_spec: MakeSpec) -> None:
    places = reserve([make_spec()] * 5, TWO_CPUS, None)

    assert places.concurrent == 2
    assert needs(places.specs[0]) == [{"CPU": 1.0}]


def test_no_more_trials_at_a_time_than_there_are(make_spec: MakeSpec) -> None:
    assert reserve([make_spec()], [{"CPU": 64.0}], None).concurrent == 1
    # Two cores are too few for eight trials, but there are two.
    assert reserve([make_spec()] * 2, TWO_CPUS, 8).concurrent == 2


@pytest.mark.parametrize(
    ("engine", "changes"),
    [("async", {}), ("sync", {}), ("allreduce", {}), ("async", {"resources": {"placement": "spread"}})],
)
def test_workers_share_what_their_driver_leaves(make_spec: MakeSpec, engine: str, changes: dict[str, Any]) -> None:
    places = reserve([make_spec(engine={"name": engine}, **changes)] * 3, TWO_CPUS, None)

    assert places.concurrent == 1
    assert needs(places.specs[0]) == [{"CPU": 0.01}, {"CPU": 0.99}, {"CPU": 0.99}]
    # Ray Train, and a run that chooses places, reserve those of their workers; with two of them a trial would wait for
    # itself.
    by_itself = engine == "allreduce" or changes
    assert reserved(places.specs[0]) == (needs(places.specs[0])[:1] if by_itself else needs(places.specs[0]))


def test_the_share_leaves_room_for_the_trials_that_were_asked_for(make_spec: MakeSpec) -> None:
    places = reserve([make_spec(engine={"name": "async"})] * 3, TWO_CPUS, 2)

    assert places.concurrent == 2
    assert needs(places.specs[0])[1:] == [{"CPU": 0.49}] * 2


@pytest.mark.parametrize(
    ("changes", "concurrent", "message"),
    [
        (
            {"engine": {"name": "async"}, "resources": {"cpus_per_worker": 1.0}},
            None,
            r"0.01 for its own process \+ 2 workers x 1 = 2.01 CPUs, together 2.01; the cluster has 2 CPUs \(1 node\)",
        ),
        ({}, 3, r"3 trials at a time of engine local: one takes 1 CPUs, together 3; .*set concurrent: 2"),
        ({"resources": {"gpus_per_worker": 1.0}}, None, r"and 1 GPUs each; the cluster has 2 CPUs"),
    ],
)
def test_a_trial_without_a_place_is_refused_with_the_arithmetic(
    make_spec: MakeSpec, changes: dict[str, Any], concurrent: int | None, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        reserve([make_spec(**changes)] * 5, TWO_CPUS, concurrent)


def test_a_worker_has_to_fit_on_one_node(make_spec: MakeSpec) -> None:
    spec = make_spec(tasks={"pets": {"workers": 3}}, engine={"name": "async"}, resources={"cpus_per_worker": 1.0})

    assert reserve([spec], [{"CPU": 2.0}, {"CPU": 1.5}], None).concurrent == 1
    # As many CPUs, but the third worker finds only halves.
    with pytest.raises(SpecError, match=r"the cluster has 1.75 CPUs, 1.75 CPUs \(2 nodes\)"):
        reserve([spec], [{"CPU": 1.75}, {"CPU": 1.75}], None)


def test_every_trial_has_to_find_room(make_spec: MakeSpec) -> None:
    wide = make_spec(tasks={"pets": {"workers": 3}}, engine={"name": "async"}, resources={"cpus_per_worker": 1.0})
    tall = make_spec(resources={"cpus_per_worker": 2.0})
    nodes = [{"CPU": 1.5}] * 3

    assert reserve([wide], nodes, None).concurrent == 1
    # It takes fewer CPUs, but all on one node.
    with pytest.raises(SpecError, match="one takes 2 CPUs"):
        reserve([wide, tall], nodes, None)


def test_the_largest_trial_sets_how_many_run_at_a_time(make_spec: MakeSpec) -> None:
    specs = [make_spec(resources={"cpus_per_worker": cpus}) for cpus in (1.0, 2.0)]

    assert reserve(specs, [{"CPU": 4.0}], None).concurrent == 2
