"""The kernel of the simulation: chance comes from the seed alone, bounds hold, and each fault does what it says."""

import subprocess
import sys
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from multitask.cluster.arithmetic import Demand, Node
from multitask.cluster.collectives import PeerLostError
from multitask.cluster.interface import Actor, Cluster, GroupStartError, OnNode, Process, Ranks, Reserved, Search
from tests.simulation.cluster import SimulatedCluster
from tests.simulation.contract import Gate, Leader, Notebook, rank_work
from tests.simulation.faults import Fault, Kind
from tests.simulation.nodes import Timing
from tests.simulation.trace import lines
from tests.simulation.world import DriverKilledError, StuckError, World

BIG = Node({"CPU": 4.0, "memory": 1e9})
SLOW = Timing(slow_share=0.2, slow_s=3.0, detect_s=2.0)


def cluster_of(*faults: Fault, seed: int = 0, nodes: tuple[Node, ...] = (BIG,), **options: Any) -> SimulatedCluster:
    return SimulatedCluster(World(seed, limit_s=600.0), nodes, faults=faults, **options)


def notebook(cluster: Cluster, **options: Any) -> Actor:
    return cluster.start(Notebook, (cluster, "first"), Process(**options))


def two_ranks(timeout_s: float = 60.0) -> Ranks:
    return Ranks(
        number=2, demand=Demand("", 2, {"CPU": 1.0}), spread=True, start_timeout_s=timeout_s, folder=Path("train")
    )


def story(seed: int) -> list[str]:
    """Return the trace of a world in which much happens."""
    faults = [
        Fault(kind=Kind.KILL, target="notebook first", at_s=2.0),
        Fault(kind=Kind.KILL_NODE, target="node 1", at_event=200),
        Fault(kind=Kind.LOSE_ANSWER, target="gate", method="open", number=2),
    ]
    cluster = cluster_of(*faults, seed=seed, nodes=(BIG, BIG), timing=SLOW)

    def body() -> None:
        gate, other = cluster.start(Gate, (), Process(restarts=True)), notebook(cluster, restarts=True)
        run = cluster.run_ranks(two_ranks(), rank_work, cluster.start(Leader, (), Process()))
        for step in range(20):
            answers = [gate.pass_through.remote(f"step {step}"), other.write.remote(step), gate.open.remote()]
            cluster.wait(answers, count=3, timeout_s=0.7)
        run.wait(30.0)

    cluster.run(body)
    found = list(lines(cluster.world.trace))
    cluster.world.close()
    return found


def test_the_seed_decides_everything() -> None:
    first = story(1)
    assert len(first) > 100
    assert first == story(1)
    assert first != story(2)


def test_the_seed_decides_the_same_in_every_process() -> None:
    code = "from tests.simulation.test_kernel import story; print(*story(1), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == story(1)


def test_an_endless_wait_is_found_and_explained() -> None:
    cluster = cluster_of()

    def body() -> None:
        gate = cluster.start(Gate, (), Process())
        cluster.get(gate.pass_through.remote("me"))

    with pytest.raises(StuckError) as raised:
        cluster.run(body)
    message = str(raised.value)
    assert "driver" in message
    assert "pass_through" in message
    cluster.world.close()


def test_an_endless_run_is_found() -> None:
    cluster = cluster_of()

    def body() -> None:
        while True:
            cluster.clock.sleep(1.0)

    with pytest.raises(StuckError, match="No end after 60"):
        cluster.run(body)
    cluster.world.close()


def drive(cluster: SimulatedCluster, body: Callable[[], None]) -> None:
    """Let a driver do something, and check that nothing is left over that it has ended."""
    cluster.run(body)
    cluster.world.settle(20.0)
    assert cluster.leftovers() == []
    cluster.world.close()


def test_leftovers_are_named() -> None:
    cluster = cluster_of()

    def body() -> None:
        places = cluster.reserve([{"CPU": 1.0}], [{}], spread=False)
        cluster.get(notebook(cluster, place=Reserved(places, 0), cpus=1.0).process.remote())

    cluster.run(body)
    found = "\n".join(cluster.leftovers())
    for word in (
        "actor notebook first is ALIVE",
        "notebook first (1002) has a thread",
        "1 places are reserved",
        "node 0 has",
    ):
        assert word in found
    cluster.world.close()


def test_a_driver_takes_its_actors_and_places_with_it() -> None:
    cluster = cluster_of(Fault(kind=Kind.KILL, target="driver", at_s=5.0))

    def body() -> None:
        cluster.reserve([{"CPU": 1.0}], [{}], spread=False)
        try:
            notebook(cluster, restarts=True)
            cluster.clock.sleep(100.0)
        finally:
            notebook(cluster)

    with pytest.raises(DriverKilledError):
        cluster.run(body)
    cluster.world.settle(20.0)
    assert cluster.leftovers() == []
    assert len(cluster.actors) == 1


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_is_lost(seed: int) -> None:
    cluster = cluster_of(Fault(kind=Kind.LOSE_ANSWER, target="notebook first", method="write", number=2), seed=seed)

    def body() -> None:
        actor = notebook(cluster)
        answers = [actor.write.remote(line) for line in range(3)]
        with pytest.raises(ActorUnavailableError):
            cluster.get(answers[1])
        assert cluster.get(answers[2]) == ["first", 0, 1, 2]
        cluster.kill(actor)

    drive(cluster, body)


@pytest.mark.parametrize("seed", range(5))
def test_a_call_is_lost(seed: int) -> None:
    cluster = cluster_of(Fault(kind=Kind.LOSE_CALL, target="notebook first", method="write", number=2), seed=seed)

    def body() -> None:
        actor = notebook(cluster)
        answers = [actor.write.remote(line) for line in range(3)]
        with pytest.raises(ActorUnavailableError):
            cluster.get(answers[1])
        assert cluster.get(answers[2]) == ["first", 0, 2]
        cluster.kill(actor)

    drive(cluster, body)


def test_a_process_dies_after_a_call() -> None:
    cluster = cluster_of(Fault(kind=Kind.KILL, target="notebook first", method="write", number=2))

    def body() -> None:
        actor = notebook(cluster, restarts=True)
        with pytest.raises(RayActorError):
            cluster.get([actor.write.remote(line) for line in range(2)][1])
        cluster.clock.sleep(5.0)
        assert cluster.get(actor.write.remote("again")) == ["first", "again"]
        cluster.kill(actor)

    drive(cluster, body)


def test_calls_and_answers_are_delayed() -> None:
    cluster = cluster_of(
        Fault(kind=Kind.DELAY_CALL, target="notebook first", method="write", number=1, seconds=5.0),
        Fault(kind=Kind.DELAY_ANSWER, target="notebook first", method="process", number=1, seconds=9.0),
    )

    def body() -> None:
        actor = notebook(cluster)
        cluster.get(actor.me.remote())
        start = cluster.clock.monotonic()
        write, process = actor.write.remote("slow"), actor.process.remote()
        cluster.get(write)
        assert cluster.clock.monotonic() - start == pytest.approx(5.0, abs=0.1)
        cluster.get(process)
        assert cluster.clock.monotonic() - start == pytest.approx(14.0, abs=0.1)
        cluster.kill(actor)

    drive(cluster, body)


@pytest.mark.parametrize(("seconds", "ends"), [(10.0, True), (inf, False)])
def test_a_process_hangs(seconds: float, ends: bool) -> None:
    cluster = cluster_of(Fault(kind=Kind.HANG, target="notebook first", at_s=5.0, seconds=seconds))

    def body() -> None:
        actor = notebook(cluster)
        cluster.clock.sleep(6.0)
        answer = actor.write.remote("second")
        with pytest.raises(GetTimeoutError):
            cluster.get(answer, 5.0)
        if ends:
            assert cluster.get(answer, 10.0) == ["first", "second"]
        cluster.kill(actor)

    drive(cluster, body)


def test_the_memory_monitor_ends_a_process() -> None:
    cluster = cluster_of(Fault(kind=Kind.OUT_OF_MEMORY, target="notebook first", at_s=5.0))

    def body() -> None:
        with pytest.raises(OutOfMemoryError):
            cluster.get(notebook(cluster).sleep.remote(60.0))

    drive(cluster, body)


def test_a_node_dies_and_another_one_joins() -> None:
    cluster = cluster_of(
        Fault(kind=Kind.KILL_NODE, target="node 1", at_s=5.0),
        Fault(kind=Kind.ADD_NODE, at_s=20.0, resources={"CPU": 3.0}, labels={"zone": "b"}),
        nodes=(Node({"CPU": 1.0}), Node({"CPU": 3.0}, {"zone": "b"})),
    )

    def body() -> None:
        assert list(cluster.nodes()) == ["node 0", "node 1"]
        places = cluster.reserve([{"CPU": 2.0}], [{"zone": "b"}], spread=False)
        actor = notebook(cluster, place=Reserved(places, 0), cpus=2.0, restarts=True)
        other = notebook(cluster, place=OnNode("node 1"))
        stored = cluster.get(other.store.remote("value"))["value"]
        cluster.clock.sleep(15.0)
        assert list(cluster.nodes()) == ["node 0"]
        with pytest.raises(ActorDiedError):
            cluster.get(other.process.remote())
        with pytest.raises(OwnerDiedError):
            cluster.get(stored)
        cluster.clock.sleep(10.0)
        assert list(cluster.nodes()) == ["node 0", "node 2"]
        assert cluster.get(actor.write.remote("second"), 5.0) == ["first", "second"]
        assert cluster.free_resources() == {"CPU": 2.0}
        cluster.release(places)

    drive(cluster, body)


def test_places_are_never_given_twice() -> None:
    cluster = cluster_of(nodes=(Node({"CPU": 1.0}), Node({"CPU": 1.0})))

    def body() -> None:
        actors = [notebook(cluster, cpus=1.0, place=Search.SPREAD) for _ in range(3)]
        started = [actor.process.remote() for actor in actors]
        ready, waiting = cluster.wait(started, count=3, timeout_s=30.0)
        assert len(ready) == 2
        cluster.kill(actors[started.index(ready[0])])
        cluster.get(waiting[0], 30.0)
        for actor in actors:
            cluster.kill(actor)

    drive(cluster, body)


def test_an_actor_goes_with_the_process_that_started_it() -> None:
    class Parent:
        def __init__(self, cluster: Cluster) -> None:
            self._cluster = cluster

        def child(self) -> Actor:
            return notebook(self._cluster, restarts=True)

    cluster = cluster_of()

    def body() -> None:
        parent = cluster.start(Parent, (cluster,), Process())
        child = cluster.get(parent.child.remote())
        cluster.get(child.process.remote())
        cluster.kill(parent)
        cluster.clock.sleep(10.0)
        with pytest.raises(ActorDiedError, match="started it"):
            cluster.get(child.process.remote())

    drive(cluster, body)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(kind=Kind.KILL, target="train", at_s=4.0), WorkerCrashedError),
        (Fault(kind=Kind.OUT_OF_MEMORY, target="train", at_s=4.0), OutOfMemoryError),
        (Fault(kind=Kind.KILL_NODE, target="node 1", at_s=4.0), NodeDiedError),
        (Fault(kind=Kind.KILL, target="train controller", at_s=4.0), RayTaskError),
    ],
)
def test_the_controller_of_ranks_is_lost(fault: Fault, expected: type[Exception]) -> None:
    nodes = (Node({"CPU": 0.0}), Node({"CPU": 2.0})) if fault.kind is Kind.KILL_NODE else (BIG,)
    cluster = cluster_of(fault, nodes=nodes)

    def forever(cluster: Cluster, leader: Actor) -> None:  # noqa: ARG001
        cluster.clock.sleep(1e6)

    def body() -> None:
        leader = cluster.start(Leader, (), Process(place=OnNode("node 0")))
        run = cluster.run_ranks(two_ranks(), forever, leader)
        if fault.kind is Kind.KILL_NODE:  # Train's task would be on any node.
            cluster.actors[-1].wanted = Process(place=OnNode("node 1"))
        with pytest.raises(expected):
            run.result()
        run.release()
        cluster.kill(leader)

    drive(cluster, body)


def test_ranks_without_places_do_not_start() -> None:
    cluster = cluster_of(nodes=(Node({"CPU": 1.0}),))

    def body() -> None:
        leader = cluster.start(Leader, (), Process())
        with pytest.raises(GroupStartError, match="no places within 10 s"):
            cluster.run_ranks(two_ranks(timeout_s=10.0), rank_work, leader).result()
        cluster.kill(leader)

    drive(cluster, body)


def test_ranks_are_cancelled_unless_a_group_is_starting() -> None:
    cluster = cluster_of()

    def forever(cluster: Cluster, leader: Actor) -> None:
        cluster.get(leader.report.remote(cluster.collectives().rank, "runs"))
        cluster.clock.sleep(1e6)

    def body() -> None:
        leader = cluster.start(Leader, (), Process())
        run = cluster.run_ranks(two_ranks(), forever, leader)
        while cluster.free_resources()["CPU"] != 2.0:  # the places are reserved
            cluster.clock.sleep(0.01)
        run.cancel()
        assert not run.wait(10.0)
        assert cluster.get(leader.state.remote())[1] == {0: "runs", 1: "runs"}
        run.cancel()
        assert run.wait(1.0)
        cluster.kill(leader)

    drive(cluster, body)


def test_ranks_whose_peer_is_lost_get_an_error_or_hang() -> None:
    ends = {end_of_the_other_rank(seed) for seed in range(20)}
    assert ends == {"error", "hangs"}


def end_of_the_other_rank(seed: int) -> str:
    """Return what a rank sees of the loss of the other one, which dies before the second sum."""
    cluster = cluster_of(seed=seed, timing=Timing(shutdown_s=0.0))
    ends: list[str] = []

    def work(cluster: Cluster, leader: Actor) -> None:
        together = cluster.collectives()
        start = together.broadcast(cluster.get(leader.count_start.remote()) if together.rank == 0 else None)
        if start > 1:
            return
        pair = together.members([0, 1])
        pair.start_sum(torch.ones(1)).wait()
        if together.rank == 1:
            cluster.kill(cluster.this_actor())
            cluster.clock.sleep(60)
        try:
            pair.start_sum(torch.ones(1)).wait()
        except PeerLostError:
            ends.append("error")

    def body() -> None:
        leader = cluster.start(Leader, (), Process())
        cluster.run_ranks(two_ranks(), work, leader).result()
        cluster.kill(leader)

    drive(cluster, body)
    return ends[0] if ends else "hangs"
