"""The computed room for workers equals the one that is found by trying every way to place them."""

from collections.abc import Mapping
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multitask.cluster.arithmetic import Demand, Node, fits, misfit, room

GPU_SHARES = (0.3, 0.4, 0.5, 0.6, 1.0, 2.0)


def left(free: tuple[int, ...], takes: int) -> tuple[int, ...] | None:
    """Return the free GPUs, in ten-thousandths, after a worker took a part of one of them or several whole ones."""
    if takes > 10_000:
        whole = [gpu for gpu in free if gpu == 10_000]
        rest = [gpu for gpu in free if gpu < 10_000]
        return (*rest, *whole[takes // 10_000 :]) if len(whole) * 10_000 >= takes else None
    enough = [gpu for gpu in free if gpu >= takes]
    if not enough:
        return None
    rest = list(free)
    rest.remove(min(enough))
    return (*rest, min(enough) - takes)


def place(node: tuple, demand: Demand) -> tuple | None:
    """Return a node, as (GPUs, other resources, labels), after it took in a worker."""
    gpus, others, labels = node
    if any((key, value) not in labels for key, value in demand.labels.items()):
        return None
    after = dict(others)
    for name, amount in demand.resources.items():
        if name == "GPU":
            gpus = left(gpus, round(amount * 10_000))
        else:
            after[name] = after.get(name, 0) - round(amount * 10_000)
    if gpus is None or any(amount < 0 for amount in after.values()):
        return None
    return tuple(sorted(gpus)), tuple(sorted(after.items())), labels


def most(demands: list[Demand], nodes: list[Node]) -> int:
    """Try every worker on every node, and leaving it out."""
    queue = [demand for demand in demands for _ in range(demand.workers)]

    @cache
    def best(number: int, state: tuple) -> int:
        if number == len(queue):
            return 0
        found = best(number + 1, state)
        for index, node in enumerate(state):
            after = place(node, queue[number])
            if after is not None:
                found = max(found, 1 + best(number + 1, (*state[:index], after, *state[index + 1 :])))
        return found

    def start(node: Node) -> tuple:
        others = {name: round(amount * 10_000) for name, amount in node.resources.items() if name != "GPU"}
        gpus = (10_000,) * int(node.resources.get("GPU", 0))
        return gpus, tuple(sorted(others.items())), tuple(node.labels.items())

    return best(0, tuple(start(node) for node in nodes))


def amounts(names: Mapping[str, tuple[float, ...]]) -> st.SearchStrategy[dict[str, float]]:
    return st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in names.items()})


LABELS = st.fixed_dictionaries({}, optional={"zone": st.sampled_from(("east", "west")), "disk": st.just("ssd")})
NODES = st.lists(
    st.builds(
        Node,
        st.builds(
            lambda cpus, more: {"CPU": cpus, **more},
            st.sampled_from((0.0, 1.0, 2.0, 3.0)),
            amounts({"GPU": (1.0, 2.0), "data": (0.5, 1.0, 2.0), "link": (1.0, 3.0)}),
        ),
        LABELS,
    ),
    max_size=3,
)


@st.composite
def demand_lists(draw: st.DrawFn) -> list[Demand]:
    gpus = draw(st.sampled_from((None, *GPU_SHARES)))
    return [
        Demand(
            f"task{number}",
            draw(st.integers(1, 3)),
            {
                "CPU": draw(st.sampled_from((0.5, 0.66, 1.0, 2.0))),
                **({"GPU": gpus} if gpus else {}),
                **draw(amounts({"data": (0.5, 1.0), "link": (1.0, 2.0)})),
            },
            draw(LABELS),
        )
        for number in range(draw(st.integers(1, 3)))
    ]


@given(demand_lists(), NODES)
def test_room_is_what_trying_every_way_finds(demands: list[Demand], nodes: list[Node]) -> None:
    expected = most(demands, nodes)
    workers = sum(demand.workers for demand in demands)

    assert room(demands, nodes) == expected
    assert fits(demands, nodes) == (expected == workers)
    assert (misfit(demands, nodes) is None) == (expected == workers)


WEST = Node({"CPU": 8.0, "data_a": 3.0}, {"zone": "west"})
EAST = Node({"CPU": 4.0}, {"zone": "east"})


def test_a_misfit_names_the_task_what_it_needs_and_what_each_node_has_room_for() -> None:
    demands = [
        Demand("Task 'a'", 4, {"CPU": 1.0, "data_a": 1.0}, {"zone": "west"}),
        Demand("Task 'b'", 2, {"CPU": 1.0}),
    ]
    assert misfit(demands, [WEST, EAST, EAST]) == (
        "Task 'a' needs 4 workers of 1 CPU, 1 data_a on nodes labelled zone=west. The cluster has room for 3 of 4: "
        "1 node with 8 CPU, 3 data_a, zone=west for 3, 2 nodes with 4 CPU, 0 data_a, zone=east for 0."
    )


def test_a_misfit_of_several_tasks_names_those_alone_that_have_no_room_together() -> None:
    demands = [
        Demand("Task 'a'", 2, {"CPU": 2.0}, {"zone": "east"}),
        Demand("Task 'far'", 8, {"CPU": 1.0}, {"zone": "west"}),
        Demand("Task 'b'", 1, {"CPU": 1.0}, {"zone": "east"}),
    ]
    assert all(fits([demand], [WEST, EAST]) for demand in demands)
    assert misfit(demands, [WEST, EAST]) == (
        "Task 'a' needs 2 workers of 2 CPU on nodes labelled zone=east; "
        "Task 'b' needs 1 worker of 1 CPU on nodes labelled zone=east. The cluster has room for 2 of 3: "
        "1 node with 4 CPU, zone=east for 2, 1 node with 8 CPU, zone=west for 0."
    )


@pytest.mark.parametrize(("share", "workers"), [(0.6, 2), (0.5, 4), (0.4, 4), (0.3, 6), (1.0, 2), (2.0, 1)])
def test_a_share_of_a_gpu_is_of_one_gpu(share: float, workers: int) -> None:
    assert room([Demand("Task 'a'", 9, {"CPU": 0.1, "GPU": share})], [Node({"CPU": 8.0, "GPU": 2.0})]) == workers


def test_room_is_found_for_a_thousand_workers_of_forty_tasks() -> None:
    nodes = [Node({"CPU": 8.0, "GPU": 1.0, "data": 4.0}, {"zone": f"z{number % 10}"}) for number in range(125)]
    kinds = [Demand(f"t{n}", 25, {"CPU": 1.0, "GPU": 0.125, "data": 0.5}, {"zone": f"z{n % 10}"}) for n in range(40)]
    # Twelve or thirteen nodes a zone, eight workers each.
    expected = sum(min(100, 8 * sum(node.labels["zone"] == f"z{zone}" for node in nodes)) for zone in range(10))
    assert room(kinds, nodes) == expected
