"""The contract of `multitask.cluster.interface.Cluster`: the same rules for Ray and for the simulation."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)

from multitask.cluster.arithmetic import Demand, Node
from multitask.cluster.interface import Actor, Cluster, GroupRun, Process, Ranks, Reserved
from multitask.cluster.ray_cluster import RayCluster
from tests.simulation.cluster import SimulatedCluster
from tests.simulation.contract import Gate, Leader, Notebook, OddError, rank_without_an_end, rank_work
from tests.simulation.world import World

SEEDS = range(10)
TIMEOUT_S = 60.0
Drive = Callable[[Callable[[Cluster], None]], None]


def in_simulations(body: Callable[[Cluster], None]) -> None:
    """Let a driver do something in several simulated clusters."""
    for seed in SEEDS:
        world = World(seed)
        cluster = SimulatedCluster(world, [Node({"CPU": 2.0, "memory": 1e9})])
        try:
            cluster.run(lambda cluster=cluster: body(cluster))
        finally:
            world.close()


@pytest.fixture(params=["simulation", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])])
def drive(request: pytest.FixtureRequest) -> Iterator[Drive]:
    """Lets a driver do something on Ray, or in simulated clusters."""
    if request.param == "simulation":
        yield in_simulations
    else:
        request.getfixturevalue("ray_cluster")
        yield lambda body: body(RayCluster())


def until(cluster: Cluster, condition: Callable[[], bool]) -> None:
    """Look again and again."""
    deadline = cluster.clock.monotonic() + TIMEOUT_S
    while not condition():
        assert cluster.clock.monotonic() < deadline, "waited in vain"
        cluster.clock.sleep(0.1)


def is_lost(cluster: Cluster, ref: Any) -> bool:
    try:
        cluster.get(ref, TIMEOUT_S)
    except ObjectLostError:
        return True
    return False


def fails(cluster: Cluster, actor: Actor) -> bool:
    try:
        cluster.get(actor.process.remote(), TIMEOUT_S)
    except RayActorError:
        return True
    return False


def test_calls_of_an_actor(drive: Drive) -> None:
    def body(cluster: Cluster) -> None:
        actor = cluster.start(Notebook, (cluster, "first"), Process())
        # Calls of one process are carried out in the order in which they were sent.
        answers = [actor.write.remote(line) for line in range(5)]
        assert cluster.get(answers[-1], TIMEOUT_S) == ["first", 0, 1, 2, 3, 4]
        assert cluster.get(answers[0]) == ["first", 0]
        # One that waits for its arguments holds up those behind it, if the actor has one thread and no coroutines.
        late = actor.sleep.remote(0.2)
        waiting = [actor.write.remote(late), actor.write.remote("last")]
        assert cluster.get(waiting[1], TIMEOUT_S)[-2:] == ["slept", "last"]
        # Arguments are copied when they are sent.
        values, array = [1, 2], np.ones(3)
        total = actor.total.remote(values, array)
        values.append(100)
        array += 100
        assert cluster.get(total, TIMEOUT_S) == (6, False)
        # An error has its own type too.
        with pytest.raises(OddError, match="odd") as raised:
            cluster.get(actor.fail.remote(), TIMEOUT_S)
        assert isinstance(raised.value, RayTaskError)
        assert type(raised.value.cause) is OddError
        # A handle is the same after a trip through a message, and the same key of a dictionary.
        returned = cluster.get(actor.me.remote(), TIMEOUT_S)
        assert returned == actor
        assert {actor: "found"}[returned] == "found"
        assert cluster.get(actor.process.remote(), TIMEOUT_S) != cluster.process_id()
        cluster.kill(actor)

    drive(body)


def test_waiting_for_answers_and_objects(drive: Drive) -> None:
    def body(cluster: Cluster) -> None:
        actor = cluster.start(Notebook, (cluster, "first"), Process())
        quick, slow = actor.write.remote("quick"), actor.sleep.remote(1.0)
        slower = actor.sleep.remote(1.0)
        assert cluster.wait([slower, slow, quick], timeout_s=TIMEOUT_S) == ([quick], [slower, slow])
        with pytest.raises(GetTimeoutError):
            cluster.get(slow, 0.05)
        ready, others = cluster.wait([slower, slow, quick], count=2, timeout_s=TIMEOUT_S)
        assert (ready, others) == ([slow, quick], [slower])
        assert cluster.wait([slower, quick], count=2, timeout_s=0) == ([quick], [slower])
        assert cluster.get(slower, TIMEOUT_S) == "slept"
        # Objects that one process stores reach another one, also in the place of an argument.
        stored = cluster.get(actor.store.remote(np.arange(3)), TIMEOUT_S)["value"]
        assert cluster.get(stored, TIMEOUT_S).tolist() == [0, 1, 2]
        assert not cluster.get(stored, TIMEOUT_S).flags.writeable
        mine = cluster.put("mine")
        assert cluster.get(mine) == "mine"
        assert cluster.get(actor.write.remote(mine), TIMEOUT_S)[-1] == "mine"
        about, parts = cluster.fetch([actor.answer_with_stored.remote(7)])
        assert (about, parts) == ("about", [{"a": 7}, {"b": 7}])
        first, second = cluster.clock.time_ns(), cluster.clock.time_ns()
        assert first <= second
        cluster.kill(actor)

    drive(body)


def test_coroutines_take_turns_at_awaits(drive: Drive) -> None:
    def body(cluster: Cluster) -> None:
        gate = cluster.start(Gate, (), Process())
        other = cluster.start(Notebook, (cluster, "first"), Process())
        passing = [gate.pass_through.remote(name) for name in "ab"]
        # Calls of an actor with coroutines may begin in another order than they were sent in.
        until(cluster, lambda: len(cluster.get(gate.lines.remote(), TIMEOUT_S)) == len("ab"))
        first, second = cluster.get(gate.open.remote(), TIMEOUT_S)
        assert {first, second} == {"a waits", "b waits"}
        expected = [first, second, first.replace("waits", "passes"), second.replace("waits", "passes")]
        assert [cluster.get(answer, TIMEOUT_S) for answer in passing] == [expected, expected]
        assert cluster.get(gate.ask.remote(other, "asked"), TIMEOUT_S) == ["first", "asked"]
        # A call that waits for its arguments is overtaken by one that was sent later.
        late = gate.note.remote(other.sleep.remote(0.5))
        early = gate.note.remote("early")
        cluster.get(late, TIMEOUT_S)
        cluster.get(early, TIMEOUT_S)
        assert cluster.get(gate.open.remote(), TIMEOUT_S)[-2:] == ["early", "slept"]
        cluster.kill(gate)
        cluster.kill(other)

    drive(body)


def test_threads_carry_out_calls_at_the_same_time(drive: Drive) -> None:
    def body(cluster: Cluster) -> None:
        actor = cluster.start(Notebook, (cluster, "first"), Process(threads=2))
        slow = actor.sleep.remote(1.0)
        quick = actor.write.remote("quick")
        assert cluster.wait([slow, quick], timeout_s=TIMEOUT_S) == ([quick], [slow])
        assert cluster.get(slow, TIMEOUT_S) == "slept"
        cluster.kill(actor)

    drive(body)


def test_an_actor_that_restarts_forgets_its_state(drive: Drive) -> None:
    def body(cluster: Cluster) -> None:
        actor = cluster.start(Notebook, (cluster, "first"), Process(restarts=True))
        assert cluster.get(actor.write.remote("second"), TIMEOUT_S) == ["first", "second"]
        before = cluster.get(actor.process.remote(), TIMEOUT_S)
        pending = actor.sleep.remote(TIMEOUT_S)
        cluster.kill(actor, restart=True)
        with pytest.raises(RayActorError):
            cluster.get(pending, TIMEOUT_S)
        until(cluster, lambda: not fails(cluster, actor))
        assert cluster.get(actor.process.remote(), TIMEOUT_S) != before
        assert cluster.get(actor.write.remote("third"), TIMEOUT_S) == ["first", "third"]
        cluster.kill(actor)
        until(cluster, lambda: fails(cluster, actor))

    drive(body)


def test_what_goes_with_a_process(drive: Drive, tmp_path: Path) -> None:
    def body(cluster: Cluster) -> None:
        done = tmp_path / "done"
        done.unlink(missing_ok=True)
        actor = cluster.start(Notebook, (cluster, "first"), Process())
        stored = cluster.get(actor.store.remote(np.arange(3)), TIMEOUT_S)["value"]
        # A call may have been carried out although its answer is lost.
        answer = actor.die_after.remote(str(done))
        with pytest.raises(RayActorError):
            cluster.get(answer, TIMEOUT_S)
        assert done.read_text(encoding="utf-8") == "done"
        with pytest.raises(RayActorError):
            cluster.get(actor.process.remote(), TIMEOUT_S)
        # What it has stored is lost with it, as soon as this node knows of its end.
        until(cluster, lambda: is_lost(cluster, stored))

    drive(body)


def test_a_lost_argument_fails_the_call(drive: Drive) -> None:
    def body(cluster: Cluster) -> None:
        dying = cluster.start(Notebook, (cluster, "first"), Process())
        actor = cluster.start(Notebook, (cluster, "first"), Process())
        answer = actor.write.remote(dying.sleep.remote(TIMEOUT_S))
        cluster.kill(dying)
        with pytest.raises(RayActorError) as raised:
            cluster.get(answer, TIMEOUT_S)
        assert isinstance(raised.value, RayTaskError)
        assert cluster.get(actor.write.remote("second"), TIMEOUT_S) == ["first", "second"]
        cluster.kill(actor)

    drive(body)


def test_reserved_places(drive: Drive) -> None:
    def free(cluster: Cluster) -> float:
        return cluster.free_resources().get("CPU", 0.0)

    def body(cluster: Cluster) -> None:
        (node,) = cluster.nodes().values()
        until(cluster, lambda: free(cluster) == node.resources["CPU"] == 2.0)
        places = cluster.reserve([{"CPU": 1.0}, {"CPU": 1.0}], [{}, {}], spread=False)
        until(cluster, lambda: free(cluster) == 0.0)
        actor = cluster.start(Notebook, (cluster, "first"), Process(place=Reserved(places, 1), cpus=1.0))
        assert cluster.get(actor.write.remote("second"), TIMEOUT_S) == ["first", "second"]
        cluster.release(places)
        until(cluster, lambda: free(cluster) == 2.0)
        until(cluster, lambda: fails(cluster, actor))

    drive(body)


def kill_ranks(cluster: Cluster, run: GroupRun, leader: Actor, before: int) -> None:
    """Kill the process that leads a group of ranks; the group's places are free when they are released.

    Args:
        before: number of starts before those of this group.
    """
    until(cluster, lambda: cluster.get(leader.starts.remote(), TIMEOUT_S) > before)
    run.kill()
    assert run.wait(TIMEOUT_S)
    with pytest.raises((WorkerCrashedError, NodeDiedError, TaskCancelledError)):
        run.result()
    run.release()
    until(cluster, lambda: cluster.free_resources().get("CPU") == 2.0)


def test_ranks(drive: Drive, tmp_path: Path) -> None:
    def body(cluster: Cluster) -> None:
        leader = cluster.start(Leader, (), Process())
        demand = Demand("Task 'pets'", 2, {"CPU": 1.0})
        ranks = Ranks(number=2, demand=demand, spread=False, start_timeout_s=TIMEOUT_S, folder=tmp_path / "train")
        run = cluster.run_ranks(ranks, rank_work, leader)
        assert not run.wait(0.0)
        deadline = cluster.clock.monotonic() + 2 * TIMEOUT_S  # two groups start, each with processes that import torch
        while not run.wait(1.0):
            assert cluster.clock.monotonic() < deadline
        run.result()
        losses, results = cluster.get(leader.state.remote(), TIMEOUT_S)
        assert len(losses) == 1
        assert "rank 1" in losses[0]
        result: Any = (2, ["rank 0", "rank 1"], [3.0, 6.0], 1.0, 20.0)
        assert results == {0: result, 1: result}
        before = cluster.get(leader.starts.remote(), TIMEOUT_S)
        kill_ranks(cluster, cluster.run_ranks(ranks, rank_without_an_end, leader), leader, before)
        cluster.kill(leader)

    started = time.monotonic()
    drive(body)
    assert time.monotonic() - started < 4 * TIMEOUT_S
