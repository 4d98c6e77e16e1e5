import pickle
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multitask.server.group import ParameterGroup
from multitask.server.layout import Layout, Role, make_layout
from multitask.server.messages import GroupValues, Push, PushRejectedError
from multitask.server.optimizers import make_optimizer
from multitask.server.parameter_server import ParameterServer
from multitask.server.schedules import constant, cosine

WORKERS = {"a/0": "a", "b/0": "b"}
USES = {"a": ["both", "only_a"], "b": ["both"]}


def make_group(size: int = 3) -> ParameterGroup:
    tensors = {"w": torch.zeros(size), "bn.running_mean": torch.zeros(2), "bn.num_batches_tracked": torch.tensor(0)}
    roles = {"w": Role.PLAIN, "bn.running_mean": Role.STATISTIC, "bn.num_batches_tracked": Role.COUNTER}
    layout: Layout = make_layout(tensors, roles, {"bn.running_mean": 0.25})
    make = partial(make_optimizer, "sgd", weight_decay=0.0, momentum=0.9)
    return ParameterGroup(layout, torch.zeros(layout.size), torch.zeros(1, dtype=torch.int64), make)


def make_server(schedule=None, evaluate_every: int = 100, workers=WORKERS) -> ParameterServer:
    groups = {"both": make_group(3), "only_a": make_group(5)}
    return ParameterServer(groups, USES, workers, schedule or constant(0.5), evaluate_every)


def make_push(worker: str = "a/0", step: int = 0, value: float = 1.0, version: int = 0, **changes) -> Push:
    floats = {"both": 32, "only_a": 32} if worker.startswith("a") else {"both": 32}
    gradients = {name: np.full(size, value, np.float32) for name, size in floats.items()}
    return Push(**{"worker": worker, "step": step, "version": version, "gradients": gradients, "loss": 1.0, "images": 8,
                   "seconds": 0.1, **changes})  # fmt: skip


def bits(server: ParameterServer) -> bytes:
    """All state of the groups: values, counters, optimiser slots."""
    groups = server._groups
    return pickle.dumps(
        [(n, g.values.tolist(), g.counters.tolist(), repr(g.optimizer_state())) for n, g in sorted(groups.items())]
    )


def test_a_push_takes_one_optimiser_step_and_one_statistics_step() -> None:
    server = make_server()

    reply = server.push(make_push())

    values = reply.groups["both"].values
    assert values[:3].tolist() == [-0.5] * 3
    assert values[16:18].tolist() == [0.25] * 2  # 0.75 * 0 + 0.25 * 1
    assert reply.groups["both"].counters.tolist() == [1]
    assert (reply.version, reply.rate) == (1, 0.5)


def test_a_push_touches_no_group_that_its_task_does_not_use() -> None:
    server = make_server()
    server.push(make_push("a/0"))
    before = server._groups["only_a"]
    values, counters, slots = before.values.clone(), before.counters.clone(), repr(before.optimizer_state())

    server.push(make_push("b/0"))

    assert torch.equal(before.values, values)
    assert torch.equal(before.counters, counters)
    assert repr(before.optimizer_state()) == slots


def test_a_repeated_push_is_answered_and_not_applied_again() -> None:
    server = make_server(cosine(0.5, rounds=4))
    first = server.push(make_push())
    server.push(make_push("b/0"))
    before = bits(server)

    again = server.push(make_push())

    assert bits(server) == before
    assert (again.applied_version, again.rate) == (first.applied_version, first.rate)
    assert again.version == 2


@pytest.mark.parametrize(
    ("push", "reason"),
    [
        (make_push(worker="c/0"), "knows .*'a/0'"),
        (make_push(step=2), "step 0 is next"),
        (make_push(version=1), "server is at 0"),
        (make_push(value=float("nan")), "not finite in group 'both'"),
        (make_push(value=float("inf")), "not finite"),
        (make_push(gradients={"both": np.zeros(32, np.float32)}), "expected float32"),
        (make_push(gradients={"both": np.zeros(31, np.float32), "only_a": np.zeros(32, np.float32)}), "31"),
        (make_push(gradients={"both": np.zeros(32), "only_a": np.zeros(32, np.float32)}), "expected float32"),
    ],
)
def test_a_rejected_push_changes_nothing_and_says_why(push: Push, reason: str) -> None:
    server = make_server()
    before = bits(server)

    with pytest.raises(PushRejectedError, match=reason):
        server.push(push)

    assert bits(server) == before
    assert server.drain() == ([], [])
    assert server.push(make_push()).version == 1


def test_a_nan_in_the_last_group_leaves_the_first_alone() -> None:
    server = make_server()
    before = bits(server)
    gradients = {"both": np.ones(32, np.float32), "only_a": np.full(32, np.nan, np.float32)}

    with pytest.raises(PushRejectedError):
        server.push(make_push(gradients=gradients))

    assert bits(server) == before


@given(st.lists(st.sampled_from(sorted(WORKERS)), max_size=40))
def test_rounds_staleness_and_rates_follow_the_order_of_arrival(arrivals: list[str]) -> None:
    server = make_server(cosine(1.0, rounds=10))
    steps, known = dict.fromkeys(WORKERS, 0), dict.fromkeys(WORKERS, 0)

    for version, worker in enumerate(arrivals):
        reply = server.push(make_push(worker, steps[worker], version=known[worker]))
        (record,), _ = server.drain()
        assert (record.staleness, record.version, record.round) == (version - known[worker], version + 1, version // 2)
        assert reply.rate == record.rate == cosine(1.0, rounds=10)(version // 2)
        known[worker] = reply.version
        steps[worker] += 1


def test_a_finished_worker_no_longer_counts_for_rounds() -> None:
    server = make_server()
    server.push(make_push("a/0"))
    server.finish("a/0")

    for step in range(3):
        server.push(make_push("b/0", step))

    assert [record.round for record in server.drain()[0]] == [0, 0, 1, 2]


def metrics(top1: float) -> dict[str, float]:
    return {"top1": top1, "top5": 100.0, "loss": 1.0}


def test_best_is_one_version_with_the_values_of_that_moment() -> None:
    server = make_server(evaluate_every=1)
    private = {"private:b": GroupValues(np.zeros(1, np.float32), np.zeros(0, np.int64))}
    means = []
    for step, top1 in enumerate((50.0, 90.0, 70.0)):
        server.push(make_push("a/0", step))
        reply = server.push(make_push("b/0", step))
        assert reply.pending == (2 * step + 2,)
        server.hand_in(reply.version, "b", metrics(top1), private)
        assert server.drain()[1] == []
        server.hand_in(reply.version, "a", metrics(top1 - 10), {})
        means += [(evaluation.mean_top1, evaluation.best) for evaluation in server.drain()[1]]
    server.finish("a/0")
    server.finish("b/0")

    result = server.result()

    assert means == [(45.0, True), (85.0, True), (65.0, False)]
    assert (result["best"].version, result["last"].version) == (4, 6)
    assert not np.array_equal(result["best"].groups["both"].values, result["last"].groups["both"].values)
    assert set(result["best"].groups) == {"both", "only_a", "private:b"}


def test_the_end_is_put_aside_once_all_workers_have_finished() -> None:
    server = make_server()
    server.push(make_push("a/0"))
    server.finish("a/0")
    assert server.pending("a") == []

    server.finish("b/0")

    assert server.pending("a") == server.pending("b") == [1]


def test_replies_are_snapshots_that_later_pushes_do_not_change() -> None:
    server = make_server()
    reply = server.push(make_push())
    before = reply.groups["both"].values.copy()

    server.push(make_push("b/0"))

    assert np.array_equal(reply.groups["both"].values, before)


def test_the_rejection_crosses_process_borders() -> None:
    assert str(pickle.loads(pickle.dumps(PushRejectedError("why")))) == "why"
