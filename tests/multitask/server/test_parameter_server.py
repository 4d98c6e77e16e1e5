import itertools
import pickle
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multitask.server.group import ParameterGroup
from multitask.server.layout import Layout, Role, make_layout
from multitask.server.messages import Gradients, GroupValues, Push, PushRejectedError, Reply
from multitask.server.optimizers import make_optimizer
from multitask.server.parameter_server import OtherShards, ParameterServer, Rules, ServedTask
from multitask.server.progress import Progress, WorkerProgress
from multitask.server.schedules import constant, cosine
from multitask.server.shard import Shard

WORKERS = {"a/0": "a", "b/0": "b"}
FLOATS = {"a": {"both": 32, "only_a": 32}, "b": {"both": 32}}


def make_layout_of(size: int) -> Layout:
    tensors = {"w": torch.zeros(size), "bn.running_mean": torch.zeros(2), "bn.num_batches_tracked": torch.tensor(0)}
    roles = {"w": Role.PLAIN, "bn.running_mean": Role.STATISTIC, "bn.num_batches_tracked": Role.COUNTER}
    return make_layout(tensors, roles, {"bn.running_mean": 0.25})


def make_group(size: int = 3) -> ParameterGroup:
    layout = make_layout_of(size)
    make = partial(make_optimizer, "sgd", weight_decay=0.0, momentum=0.9)
    return ParameterGroup(layout, GroupValues(np.zeros(layout.pushed, np.float32), np.zeros(1, np.int64)), make)


def make_server(
    schedule: Any = None,
    evaluate_every: int = 100,
    workers: dict[str, str] = WORKERS,
    weights: tuple[float, float] = (1.0, 1.0),
    progress: Progress | None = None,
    others: OtherShards | None = None,
    **rules: Any,
) -> ParameterServer:
    tasks = {"a": ServedTask(("both", "only_a"), weight=weights[0]), "b": ServedTask(("both",), weight=weights[1])}
    return ParameterServer(
        Shard({"both": make_group(3), "only_a": make_group(5)}),
        tasks,
        workers,
        schedule or constant(0.5),
        Rules(evaluate_every, **rules),
        progress or Progress(workers={name: WorkerProgress() for name in workers}),
        others,
    )


def send(
    server: ParameterServer,
    worker: str = "a/0",
    step: int = 0,
    value: float = 1.0,
    gradients: Gradients | None = None,
    **changes: Any,
) -> Reply | None:
    floats = FLOATS.get(worker[0], {})
    gradients = gradients or {name: np.full(size, value, np.float32) for name, size in floats.items()}
    push = Push(**{"worker": worker, "step": step, "version": 0, "loss": 1.0, "images": 8, "seconds": 0.1, **changes})
    server.push(push, gradients)
    return server.reply(worker)


def values(server: ParameterServer, name: str = "both") -> np.ndarray:
    return server.shard.groups[name].values.numpy()


def bits(server: ParameterServer) -> bytes:
    """All state of the groups: values, counters, optimiser slots."""
    return pickle.dumps([(name, group.state(slots=True)) for name, group in sorted(server.shard.groups.items())])


def test_a_push_takes_one_optimiser_step_and_one_statistics_step() -> None:
    server = make_server()

    reply = send(server)

    assert values(server)[:3].tolist() == [-0.5] * 3
    assert values(server)[16:18].tolist() == [0.25] * 2  # 0.75 * 0 + 0.25 * 1
    assert server.shard.groups["both"].counters.tolist() == [1]
    assert reply is not None
    assert (reply.version, reply.rate, reply.rejected) == (1, 0.5, None)


def test_a_push_touches_no_group_that_its_task_does_not_use() -> None:
    server = make_server()
    send(server, "a/0")
    before = pickle.dumps(server.shard.groups["only_a"].state(slots=True))

    send(server, "b/0")

    assert pickle.dumps(server.shard.groups["only_a"].state(slots=True)) == before


def test_a_repeated_push_is_answered_and_not_applied_again() -> None:
    server = make_server(cosine(0.5, rounds=4))
    first = send(server)
    send(server, "b/0")
    before = bits(server)

    again = send(server)

    assert bits(server) == before
    assert first is not None
    assert again is not None
    assert again.rate == first.rate
    assert again.version == 2


@pytest.mark.parametrize("rejected", [0, 1])
def test_two_pushes_on_their_way_get_an_answer_each(rejected: int) -> None:
    """The bound holds back the answer to the first push until the second push has arrived."""
    server = make_server(bound=2, in_flight=1)
    for step in range(2):
        send(server, "a/0", step, value=float("nan") if step == rejected else 1.0)
    assert server.reply("a/0", 0) is None
    send(server, "b/0", 0)
    send(server, "b/0", 1)

    replies = [server.reply("a/0", step) for step in range(2)]

    assert None not in replies
    assert [step for step, reply in enumerate(replies) if reply and reply.rejected] == [rejected]


def test_a_push_repeated_before_its_round_is_complete_counts_once() -> None:
    once, twice = make_server(together=True), make_server(together=True)
    send(once, "a/0")
    send(twice, "a/0")
    send(twice, "a/0")
    for server in (once, twice):
        send(server, "b/0")

    assert bits(twice) == bits(once)


def test_a_later_push_in_an_open_round_is_out_of_order() -> None:
    server = make_server(together=True)
    send(server, "a/0")

    with pytest.raises(PushRejectedError, match="step 0 is next"):
        send(server, "a/0", 1)


@pytest.mark.parametrize(
    ("push", "reason"),
    [
        ({"worker": "c/0"}, "knows .*'a/0'"),
        ({"step": 2}, "step 0 is next"),
        ({"version": 1}, "server is at 0"),
    ],
)
def test_a_push_from_elsewhere_is_rejected_and_changes_nothing(push: dict[str, Any], reason: str) -> None:
    server = make_server()
    before = bits(server)

    with pytest.raises(PushRejectedError, match=reason):
        send(server, **push)

    assert bits(server) == before
    assert server.drain()[:2] == ([], {})
    assert send(server).version == 1  # type: ignore[union-attr]


def flat(both: np.ndarray, only_a: np.ndarray | None = None) -> Gradients:
    return {"both": both, "only_a": np.zeros(32, np.float32) if only_a is None else only_a}


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("gradients", "reason"),
    [
        (flat(np.full(32, np.nan, np.float32)), "not finite in group 'both'"),
        (flat(np.ones(32, np.float32), np.full(32, np.inf, np.float32)), "not finite in group 'only_a'"),
        ({"both": np.zeros(32, np.float32)}, "expected float32"),
        (flat(np.zeros(31, np.float32)), "31"),
        (flat(np.zeros(32)), "expected float32"),
    ],
)
def test_a_refused_push_changes_no_value_and_its_step_is_over(
    gradients: Gradients, reason: str, together: bool
) -> None:
    server = make_server(workers={"a/0": "a"}, together=together)
    send(server)
    before = bits(server)

    reply = send(server, step=1, gradients=gradients, version=1)

    assert bits(server) == before
    assert reply is not None
    assert reply.rejected is not None
    assert reason in reply.rejected
    assert "worker 'a/0' (task 'a')" in reply.rejected
    assert "loss 1" in reply.rejected
    records, _, progress = server.drain()
    assert [record.rejected for record in records] == [None, reply.rejected]
    assert (progress.version, progress.workers["a/0"].step, progress.workers["a/0"].rejected) == (1, 2, 1)
    following = send(server, step=2, version=1)
    assert following is not None
    assert following.rejected is None


def test_a_refused_push_is_left_out_of_the_rounds_mean() -> None:
    server = make_server(together=True)
    assert send(server, "a/0", value=float("nan")) is None
    send(server, "b/0", value=3.0)
    assert values(server)[:3].tolist() == [-1.5] * 3
    assert values(server, "only_a")[:5].tolist() == [0.0] * 5


def test_calls_of_a_replaced_process_are_rejected() -> None:
    server = make_server()
    send(server)
    server.join("a/0", 1, step=1)
    before = bits(server)
    with pytest.raises(PushRejectedError, match=r"process 0 of worker 'a/0', but process 1"):
        send(server, step=1)
    assert bits(server) == before
    assert send(server, step=1, incarnation=1).version == 2  # type: ignore[union-attr]


def test_what_a_replaced_process_sends_to_a_shard_late_is_not_applied_and_not_kept() -> None:
    other = Shard({"both": make_group(3), "only_a": make_group(5)})
    server = make_server(others=other)
    server.join("a/0", 1, step=None)
    push = Push(worker="a/0", step=0, version=0, loss=1.0, images=8, seconds=0.1, incarnation=1)
    late = replace(push, incarnation=0)
    for of, value in ((push, 1.0), (late, 9.0)):
        gradients = {name: np.full(32, value, np.float32) for name in FLOATS["a"]}
        assert other.stash(of.key, gradients, FLOATS["a"]) is None

    send(server, incarnation=1)

    assert pickle.dumps(other.groups["both"].state()) == pickle.dumps(server.shard.groups["both"].state())
    assert other.stashed == {}


def test_what_unknown_workers_and_earlier_processes_send_is_counted_as_nobodys_step() -> None:
    server = make_server()
    server.join("a/0", 1, step=None)
    for worker in ("c/0", "a/0"):
        with pytest.raises(PushRejectedError):
            send(server, worker)
    with pytest.raises(PushRejectedError):
        server.join("a/0", 0, step=None)
    send(server, incarnation=1)

    progress = server.drain()[2]

    assert progress.rejected_calls == 3
    assert progress.workers == {"a/0": WorkerProgress(step=1), "b/0": WorkerProgress()}
    assert Progress.from_json(progress.to_json()).with_workers({"b/0": "b"}).rejected_calls == 3


@given(st.lists(st.sampled_from(sorted(WORKERS)), max_size=40))
def test_rounds_staleness_and_rates_follow_the_order_of_arrival(arrivals: list[str]) -> None:
    server = make_server(cosine(1.0, rounds=10))
    steps, known = dict.fromkeys(WORKERS, 0), dict.fromkeys(WORKERS, 0)

    for version, worker in enumerate(arrivals):
        reply = send(server, worker, steps[worker], version=known[worker])
        (record,), _, _ = server.drain()
        assert (record.staleness, record.version, record.round) == (version - known[worker], version + 1, version // 2)
        assert reply is not None
        assert reply.rate == record.rate == cosine(1.0, rounds=10)(version // 2)
        known[worker] = reply.version
        steps[worker] += 1


def test_rates_may_be_divided_by_the_staleness() -> None:
    server = make_server(divide_rate_by_staleness=True)
    for step in range(3):
        send(server, "b/0", step, value=0.0, version=step)
    send(server, "a/0", value=1.0, version=0)
    assert values(server)[:3].tolist() == pytest.approx([-0.5 / 3] * 3)


def test_a_finished_worker_no_longer_counts_for_rounds() -> None:
    server = make_server()
    send(server, "a/0")
    server.finish("a/0", 0)

    for step in range(3):
        send(server, "b/0", step)

    assert [record.round for record in server.drain()[0]] == [0, 0, 1, 2]


def metrics(top1: float) -> dict[str, float]:
    return {"top1": top1, "top5": 100.0, "loss": 1.0}


def test_best_is_one_version_with_the_values_of_that_moment() -> None:
    server = make_server(evaluate_every=1)
    private = {"private:b": GroupValues(np.zeros(1, np.float32), np.zeros(0, np.int64))}
    found, kept = [], []
    for step, top1 in enumerate((50.0, 90.0, 70.0)):
        send(server, "a/0", step)
        reply = send(server, "b/0", step)
        assert reply is not None
        assert [request.version for request in reply.requests] == [2 * step + 2]
        server.report_evaluation(reply.requests[0], "b", metrics(top1), private)
        assert server.drain()[1] == {}
        server.report_evaluation(reply.requests[0], "a", metrics(top1 - 10), {})
        ((version, completed),) = server.drain()[1].items()
        assert completed.evaluation is not None
        assert set(completed.evaluation.groups) == {"private:b"}
        found.append((version, completed.evaluation.mean_top1, completed.evaluation.best))
        kept.append(server.shard.snapshot(version)["both"].values.tolist())  # type: ignore[index]

    assert found == [(2, 45.0, True), (4, 85.0, True), (6, 65.0, False)]
    assert len({tuple(values) for values in kept}) == 3
    server.drop_snapshot(2)
    assert server.shard.snapshot(2) is None


def test_the_end_is_put_aside_once_all_workers_have_finished() -> None:
    server = make_server()
    send(server, "a/0")
    server.finish("a/0", 0)
    assert server.snapshot_requests("a/0") == ()

    server.finish("b/0", 0)

    assert (
        [request.version for request in server.snapshot_requests("a/0")]
        == [request.version for request in server.snapshot_requests("b/0")]
        == [1]
    )


def test_only_the_first_worker_of_a_task_owes_its_validation() -> None:
    server = make_server(workers={"a/0": "a", "a/1": "a", "b/0": "b"}, evaluate_every=1)
    for worker in ("a/0", "a/1", "b/0"):
        send(server, worker)
    assert server.workers_with_requests() == ["a/0", "b/0"]
    server.report_evaluation(server.snapshot_requests("a/0")[0], "a", metrics(50.0), {})
    assert server.workers_with_requests() == ["b/0"]


def test_a_version_put_aside_keeps_its_values() -> None:
    server = make_server(evaluate_every=1)
    send(server, "a/0")
    send(server, "b/0")
    kept = server.shard.snapshot(2)
    assert kept is not None
    before = kept["both"].values.copy()

    send(server, "b/0", 1)

    assert np.array_equal(kept["both"].values, before)
    assert not np.array_equal(values(server), before)


# Engine `sync`: pushes of a round are applied together.


@given(st.permutations(["a/0", "a/1", "b/0"]), st.integers(0, 2**32 - 1))
def test_a_round_is_the_weighted_mean_whatever_the_order_of_arrival(order: list[str], seed: int) -> None:
    workers = {"a/0": "a", "a/1": "a", "b/0": "b"}
    random = np.random.default_rng(seed)
    gradients = {
        worker: {name: random.normal(size=32).astype(np.float32) for name in FLOATS[worker[0]]} for worker in workers
    }

    def run(arrivals: list[str]) -> ParameterServer:
        server = make_server(workers=workers, weights=(1.0, 2.0), together=True)
        for worker in arrivals[:-1]:
            assert send(server, worker, gradients=gradients[worker]) is None
        assert send(server, arrivals[-1], gradients=gradients[arrivals[-1]]) is not None
        return server

    server = run(order)
    assert bits(server) == bits(run(list(workers)))
    exact = {worker: {n: g.astype(np.float64) for n, g in own.items()} for worker, own in gradients.items()}
    both = (exact["a/0"]["both"] + exact["a/1"]["both"] + 2 * exact["b/0"]["both"]) / 4
    only_a = (exact["a/0"]["only_a"] + exact["a/1"]["only_a"]) / 2
    np.testing.assert_allclose(values(server)[:3], -0.5 * both[:3], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values(server)[16:18], 0.25 * both[16:18], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values(server, "only_a")[:5], -0.5 * only_a[:5], rtol=1e-5, atol=1e-6)
    assert server.drain()[2].version == 1


def test_a_round_does_not_wait_for_a_worker_that_has_finished() -> None:
    server = make_server(together=True)
    send(server, "a/0")
    send(server, "b/0")
    assert send(server, "b/0", 1, version=1) is None
    server.finish("a/0", 0)
    reply = server.reply("b/0")
    assert reply is not None
    assert reply.version == 2


# Engine `bounded`.


@given(st.integers(1, 4), st.lists(st.sampled_from(["a/0", "b/0"]), max_size=60))
def test_a_worker_waits_when_it_is_ahead_by_the_bound_and_only_then(bound: int, turns: list[str]) -> None:
    server = make_server(bound=bound)
    steps = dict.fromkeys(WORKERS, 0)
    for worker in turns:
        if server.reply(worker) is not None:
            send(server, worker, steps[worker], version=steps[worker])
            steps[worker] += 1
        for name, step in steps.items():
            assert (server.reply(name) is None) == (step - min(steps.values()) >= bound)
    assert max(steps.values()) - min(steps.values()) <= bound


def test_the_work_of_a_push_grows_with_the_number_of_workers_and_not_with_its_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 1,000 workers, the square took a tenth of a second for each push."""
    names = [f"b/{rank}" for rank in range(50)]
    server = make_server(workers=dict.fromkeys(names, "b"), bound=1)
    looks = []
    reached = WorkerProgress.reached
    monkeypatch.setattr(WorkerProgress, "reached", property(lambda one: looks.append(one) or reached.fget(one)))  # type: ignore[attr-defined]

    for name in names[1:]:
        assert send(server, name) is None
        looks_of_a_push, looks[:] = len(looks), []
        assert 0 < looks_of_a_push < 5 * len(names)
    assert send(server, names[0]) is not None
    assert server.reply(names[1]) is not None


# Workers that come back.


def test_steps_made_again_change_nothing_on_the_server_and_are_counted() -> None:
    server = make_server()
    for step in range(4):
        send(server, "a/0", step, version=step)
    server.drain()
    before = bits(server)
    server.join("a/0", 1, step=1)

    for step in range(1, 4):
        reply = send(server, "a/0", step, version=4, incarnation=1)
        assert reply is not None
        assert reply.version == 4
    assert bits(server) == before
    send(server, "a/0", 4, version=4, incarnation=1)

    records, _, progress = server.drain()
    assert [record.redone for record in records] == [True, True, True, False]
    assert (progress.version, progress.workers["a/0"].redone, progress.workers["a/0"].step) == (5, 3, 5)


def test_after_the_server_went_back_newer_steps_are_counted_as_lost() -> None:
    progress = Progress(version=3, workers={"a/0": WorkerProgress(step=2), "b/0": WorkerProgress(step=1)})
    server = make_server(progress=progress)
    server.join("a/0", 0, step=5)
    server.join("b/0", 0, step=1)

    send(server, "a/0", 5, version=3)

    now = server.drain()[2]
    assert (now.version, now.workers["a/0"].step, now.workers["a/0"].lost, now.workers["b/0"].lost) == (4, 6, 3, 0)
    # The schedule goes on as if the lost steps had been applied.
    assert now.rounds == 2


def test_a_worker_that_holds_nothing_goes_on_where_the_server_stands() -> None:
    server = make_server()
    send(server, "a/0", 0, position=8)
    server.join("a/0", 1, step=None)
    reply = server.reply("a/0")
    assert reply is not None
    assert (reply.step, reply.position) == (1, 8)


def test_a_push_counts_in_its_round_though_another_process_takes_its_workers_place() -> None:
    server = make_server(together=True)
    send(server, "a/0", value=1.0, position=8)
    server.join("a/0", 1, step=None)
    assert server.reply("a/0") is None
    send(server, "b/0", value=3.0)
    reply = server.reply("a/0")
    assert reply is not None
    assert (reply.step, reply.position) == (1, 8)
    assert values(server)[:3].tolist() == [-1.0] * 3


def test_a_pause_lets_everybody_stop_at_the_end_of_a_round() -> None:
    each, together = make_server(), make_server(together=True)
    for server in (each, together):
        server.pause()
    assert send(each, "a/0").pause  # type: ignore[union-attr]
    assert send(together, "a/0") is None
    assert send(together, "b/0").pause  # type: ignore[union-attr]
    assert together.reply("a/0").pause  # type: ignore[union-attr]


def not_heard_of(server: ParameterServer, worker: str, seconds: float) -> None:
    server.liveness.report(worker, time.monotonic() - seconds)


@pytest.mark.parametrize("rules", [{"together": True}, {"bound": 1}])
def test_a_worker_that_waited_for_others_has_its_whole_time_once_it_may_go_on(rules: dict[str, Any]) -> None:
    server = make_server(**rules)
    send(server, "a/0")
    for worker in WORKERS:
        not_heard_of(server, worker, 1000)
    assert server.silent_workers(600, WORKERS) == ["b/0"]
    send(server, "b/0")
    assert server.silent_workers(600, WORKERS) == []
    not_heard_of(server, "a/0", 1000)
    assert server.silent_workers(600, WORKERS) == ["a/0"]


def test_a_worker_of_which_nothing_is_asked_is_not_silent_and_its_time_begins_when_it_is() -> None:
    """A paused worker is still active, and a finished worker may be asked to report, so neither fact decides."""
    server = make_server()
    server.finish("b/0", 0)
    for worker in WORKERS:
        not_heard_of(server, worker, 1000)
    assert server.silent_workers(600, ()) == []
    assert server.silent_workers(600, WORKERS) == []
    for worker in WORKERS:
        not_heard_of(server, worker, 1000)
    assert server.silent_workers(600, WORKERS) == list(WORKERS)


# Checkpoints and new tasks.


def test_a_checkpoint_is_complete_when_every_worker_handed_in_what_it_holds() -> None:
    server = make_server(save_every_rounds=1)
    send(server, "a/0")
    reply = send(server, "b/0")
    assert reply is not None
    (request,) = reply.requests
    assert (request.version, request.evaluate, request.save) == (2, False, True)
    held = {"private:b": GroupValues(np.ones(1, np.float32), np.zeros(0, np.int64))}
    server.report_state(request, "b/0", 1, 8, held)
    assert server.drain()[1] == {}
    send(server, "b/0", 1)
    server.report_state(request, "a/0", 1, 8, {})

    completed = server.drain()[1][2]
    assert completed.saved == held
    assert completed.evaluation is None
    assert completed.progress.version == 2
    assert completed.progress.workers["b/0"] == WorkerProgress(step=1, private_step=1, private_position=8)
    assert Progress.from_json(completed.progress.to_json()) == completed.progress
    assert server.shard.snapshot(2)["both"].slots.keys() == {"momentum_buffer"}  # type: ignore[index]


def test_a_checkpoint_whose_version_is_validated_later_says_how_far_the_private_tensors_are() -> None:
    server = make_server(workers={"b/0": "b"}, save_every_rounds=1)
    for step in range(5):
        send(server, "b/0", step, version=step)
        server.report_state(server.snapshot_requests("b/0")[0], "b/0", step + 1, 8 * (step + 1), {})
    server.finish("b/0", 0)
    (request,) = server.snapshot_requests("b/0")
    for task in ("a", "b"):
        server.report_evaluation(request, task, metrics(50.0), {})

    completed = server.drain()[1][5]

    assert completed.evaluation is not None
    assert completed.saved is not None
    assert completed.progress.workers["b/0"] == WorkerProgress(5, 0, private_step=5, private_position=40)
    assert completed.progress.best_top1 == 50.0


def test_a_task_that_joins_later_follows_the_schedule_from_its_own_start() -> None:
    schedule = cosine(1.0, rounds=10)
    before = Progress(version=8, rounds=8, workers={"a/0": WorkerProgress(step=8)})  # type: ignore[arg-type]
    server = make_server(schedule, progress=before.with_workers(WORKERS))
    shared = values(server).copy()

    reply = send(server, "b/0", version=8)

    assert reply is not None
    assert reply.rate == 1.0
    assert (values(server)[:3] - shared[:3]).tolist() == pytest.approx([-schedule(8)] * 3)
    # Bounds count from the moment of joining.
    assert before.with_workers(WORKERS).workers["b/0"].lap == 8


@given(st.integers(1, 5), st.integers(1, 400), st.integers(0, 100))
def test_shards_cut_a_group_into_ranges_that_cover_it_once(shards: int, size: int, seed: int) -> None:
    """Updates of the ranges equal the update of the whole group bit for bit, slots included."""
    tensors = {"w": torch.zeros(size, 2), "b": torch.zeros(size), "bn.running_mean": torch.zeros(size)}
    roles = {"w": Role.DECAYED, "b": Role.PLAIN, "bn.running_mean": Role.STATISTIC}
    layout = make_layout(tensors, roles, {"bn.running_mean": 0.1})
    ranges = layout.ranges(shards)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == layout.pushed
    assert all(left[1] == right[0] for left, right in itertools.pairwise(ranges))
    random = np.random.default_rng(seed)
    start = GroupValues(random.normal(size=layout.pushed).astype(np.float32), np.zeros(0, np.int64))
    make = partial(make_optimizer, "adamw", weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    whole = ParameterGroup(layout, start, make)
    parts = [ParameterGroup(layout, start, make, part=part) for part in ranges]
    for _ in range(3):
        push = torch.from_numpy(random.normal(size=layout.pushed).astype(np.float32))
        whole.apply(push, 0.01)
        for part, (begin, end) in zip(parts, ranges, strict=True):
            if part.size:
                part.apply(push[begin:end], 0.01)
    state, states = whole.state(slots=True), [part.state(slots=True) for part in parts if part.size]
    assert state.values.tobytes() == b"".join(part.values.tobytes() for part in states)
    for name, slot in state.slots.items():
        assert slot.tobytes() == b"".join(part.slots[name].tobytes() for part in states)
    # A group that starts from a saved state goes on as if it had not stopped.
    again = ParameterGroup(layout, state, make)
    for group in (whole, again):
        group.apply(push, 0.01)
    assert pickle.dumps(again.state(slots=True)) == pickle.dumps(whole.state(slots=True))


def test_the_rejection_crosses_process_borders() -> None:
    assert str(pickle.loads(pickle.dumps(PushRejectedError("why")))) == "why"
