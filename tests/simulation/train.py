"""Groups of ranks as Ray Train runs them, simulated.

The order of events is that of Train v2 in Ray 2.60: a task (here the process "train") starts a controller ("train
controller") on its node. The controller reserves places for all ranks, starts them, sets up their process group, and
lets them work. It looks at them twice a second. When a rank is lost or has raised an exception, it first tells the
leader, then ends the other ranks, which takes a while in which they go on, then gives the places back, and starts the
next group.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ray.exceptions import RayError

from multitask.cluster.interface import GroupStartError, OnNode, Ranks, Reserved, Search
from multitask.cluster.interface import Process as Wanted
from multitask.cluster.ray_ranks import CONTROLLER_END_S
from tests.simulation.actors import Actor, Handle
from tests.simulation.collectives import RankGroup
from tests.simulation.messages import share
from tests.simulation.nodes import PlacementGroup
from tests.simulation.refs import Ref, Waiter

if TYPE_CHECKING:
    from tests.simulation.cluster import SimulatedCluster

LOOK_S = 0.5
"""Seconds between two looks of the controller at the ranks."""
PATIENCE_S = 5.0
"""For how long the controller waits for ranks that do not answer, before it ends all of them."""


class RankActor:
    """The process of one rank."""

    def __init__(self, cluster: "SimulatedCluster") -> None:
        self._cluster = cluster

    def ping(self) -> None:
        """Answer, to show that the process runs."""

    def run(self, group: RankGroup, rank: int, work: Callable[..., None], leader: Handle) -> None:
        """Do the work of a rank."""
        group.join(rank, self._cluster.world.here())
        work(self._cluster, leader)


class WrittenDown:
    """The places of the group that has started last, as the ranks write them down in the store of the head."""

    def __init__(self) -> None:
        self.places: PlacementGroup | None = None


share(WrittenDown)


class TrainController:
    """Starts groups of ranks until one has ended its work."""

    def __init__(self, cluster: "SimulatedCluster", ranks: Ranks, written: WrittenDown) -> None:
        self._cluster, self._world, self._ranks, self._written = cluster, cluster.world, ranks, written
        self._actors: list[Actor] = []
        self._places: PlacementGroup | None = None
        self.is_starting = True
        cluster.world.here().at_death.append(self._release_starting_places)

    def run(self, work: Callable[..., None], leader: Handle) -> None:
        """Run groups until one has ended its work.

        Raises:
            GroupStartError: a group could not start.
        """
        has_ended = False
        while not has_ended:
            self.is_starting = True
            self._start_ranks()
            group = RankGroup(self._cluster, self._ranks.number)
            calls = [actor.handle.run.remote(group, rank, work, leader) for rank, actor in enumerate(self._actors)]
            self._written.places = self._places
            self.is_starting = False
            has_ended = self._watch(calls, leader)
            self._end_ranks()

    def abort(self) -> None:
        """End all ranks and give their places back at once; called by an event of the world."""
        for actor in self._actors:
            self._cluster.losses.kill(actor, False)
        if self._places is not None:
            self._cluster.losses.release(self._places)

    def _release_starting_places(self) -> None:
        """Give back the places of a group that was starting when the controller died.

        Ray keeps them until the job ends, and nobody else knows of them. The simulation leaves out this gap of Train.
        """
        if self._places is not None and self.is_starting:
            self._cluster.losses.release(self._places)

    def _start_ranks(self) -> None:
        """Start the processes of a group.

        Raises:
            GroupStartError: there were no places in time, or a process was lost.
        """
        number, demand = self._ranks.number, self._ranks.demand
        self._places = places = self._cluster.reserve(
            [demand.resources] * number, [demand.labels] * number, self._ranks.spread
        )
        if not self._wait_for(places):
            self._cluster.release(places)
            raise GroupStartError(f"{number} ranks found no places within {self._ranks.start_timeout_s:g} s.")
        others = {name: amount for name, amount in demand.resources.items() if name not in ("CPU", "GPU")}
        cpus, gpus = demand.resources.get("CPU", 0.0), demand.resources.get("GPU", 0.0)
        self._actors = [
            self._cluster.start_actor(
                f"rank {rank}",
                RankActor,
                (self._cluster,),
                Wanted(place=Reserved(places, rank), cpus=cpus, gpus=gpus, resources=others),
            )
            for rank in range(number)
        ]
        try:
            for ping in [actor.handle.ping.remote() for actor in self._actors]:
                self._cluster.get(ping)
            self._world.sleep(self._cluster.timing.start_s * self._world.random.random())  # their process group
            for ping in [actor.handle.ping.remote() for actor in self._actors]:
                self._cluster.get(ping)
        except RayError as error:
            self._end_ranks()
            raise GroupStartError(f"A rank was lost while it started: {error}") from None

    def _wait_for(self, places: PlacementGroup) -> bool:
        """Return whether all places were found in time."""
        if not places.is_placed:
            waiter = Waiter(self._world, self._world.thread(), 1)
            places.waiters.append(waiter)
            self._world.later(self._ranks.start_timeout_s, waiter.time_out)
            self._world.block("places for all ranks")
        return places.is_placed

    def _watch(self, calls: list[Ref], leader: Handle) -> bool:
        """Return True when all ranks have ended their work, or False when one is lost or has raised an exception."""
        while True:
            self._world.sleep(LOOK_S)
            errors = {rank: call.error for rank, call in enumerate(calls) if call.error is not None}
            if errors:
                causes = {rank: getattr(error, "cause", error) for rank, error in errors.items()}
                leader.lose.remote("; ".join(f"rank {r}: {str(why).splitlines()[0]}" for r, why in causes.items()))
                return False
            if all(call.ready for call in calls):
                return True

    def _end_ranks(self) -> None:
        """End the ranks that still live, and give all places back."""
        living = [actor.process for actor in self._actors if actor.process is not None]
        hangs = any(process.held is not None for process in living)
        self._world.sleep(PATIENCE_S if hangs else self._cluster.timing.shutdown_s * self._world.random.random())
        for actor in self._actors:
            self._cluster.kill(actor.handle)
        self._cluster.release(self._places)
        self._actors, self._places = [], None


class TrainTask:
    """The task that a run of Train is."""

    def __init__(self, cluster: "SimulatedCluster") -> None:
        self._cluster = cluster
        self.controller: Actor | None = None

    def fit(self, ranks: Ranks, work: Callable[..., None], leader: Handle, written: WrittenDown) -> None:
        """Run groups of ranks until one has ended its work."""
        wanted = Wanted(place=OnNode(self._cluster.this_node()))
        arguments = self._cluster, ranks, written
        self.controller = self._cluster.start_actor("train controller", TrainController, arguments, wanted)
        try:
            self._cluster.get(self.controller.handle.run.remote(work, leader))
        except GroupStartError:
            written.places = None
            raise
        written.places = None


class SimulatedGroupRun:
    """`multitask.cluster.interface.GroupRun`."""

    def __init__(self, cluster: "SimulatedCluster", ranks: Ranks, work: Callable[..., None], leader: Handle) -> None:
        self._cluster = cluster
        wanted = Wanted(place=Search.ANYWHERE)
        self._task = cluster.start_actor("train", TrainTask, (cluster,), wanted, is_task=True)
        self._written = WrittenDown()
        self._fit: Ref = self._task.handle.fit.remote(ranks, work, leader, self._written)
        self._fit.waiters.append(self)

    def arrive(self) -> None:
        """End the process of the task, whose result has arrived."""
        self._cluster.world.soon(self._cluster.losses.kill, self._task, False)

    def wait(self, timeout_s: float) -> bool:
        done, _ = self._cluster.wait([self._fit], timeout_s=timeout_s)
        return bool(done)

    def result(self) -> None:
        self._cluster.get(self._fit)

    def cancel(self) -> None:
        node = self._cluster.world.here().node
        self._cluster.world.later(node.delay_from(node), self._cancel)

    def kill(self) -> None:
        node = self._cluster.world.here().node
        self._cluster.world.later(node.delay_from(node), self._cluster.losses.kill, self._task, False)

    def release(self) -> None:
        if self._written.places is not None:
            self._cluster.world.sleep(CONTROLLER_END_S)
            self._cluster.release(self._written.places)

    def _cancel(self) -> None:
        task = self._task.instance
        controller = None if task is None or task.controller is None else task.controller.instance
        if controller is not None:
            if controller.is_starting:
                self._cluster.world.note("cancel", "is ignored, because a group is starting")
                return
            controller.abort()
            self._cluster.losses.kill(task.controller, False)
            self._written.places = None
        self._cluster.world.note("cancel", "ends all ranks")
        self._cluster.losses.kill(self._task, False)
