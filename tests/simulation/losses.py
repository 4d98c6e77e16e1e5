"""Deaths of processes and nodes, and who learns of them when."""

from enum import Enum
from typing import TYPE_CHECKING

from ray.exceptions import NodeDiedError, OutOfMemoryError, OwnerDiedError, RayError, WorkerCrashedError

from tests.simulation.actors import Actor, State
from tests.simulation.nodes import PlacementGroup, SimulatedNode
from tests.simulation.refs import died, unavailable
from tests.simulation.world import Process

if TYPE_CHECKING:
    from tests.simulation.cluster import SimulatedCluster


class Cause(Enum):
    """Why a process died."""

    KILLED = "it was killed"
    OUT_OF_MEMORY = "the memory monitor has ended it"
    NODE = "its node died"
    OWNER = "the process that had started it is gone"


class Losses:
    """Ends processes and nodes. All methods are called by events."""

    def __init__(self, cluster: "SimulatedCluster") -> None:
        self._cluster, self._world = cluster, cluster.world

    def kill(self, actor: Actor, restart: bool, cause: Cause = Cause.KILLED) -> None:
        """End the process of an actor.

        Args:
            restart: let the cluster start it again, if it was started with `restarts`.
        """
        if not restart:
            actor.ends = True
        if actor.process is not None:
            self.end_process(actor.process, cause)
        elif actor.ends and actor.state is not State.DEAD:
            self._world.note("end", actor)
            actor.end(self._error(actor, cause))

    def end_actor(self, actor: Actor, error: RayError) -> None:
        """End an actor whose constructor has raised an exception."""
        self.kill(actor, False)
        actor.error = error

    def end_process(self, process: Process, cause: Cause) -> None:
        """End a process at once. Others learn of it later."""
        if not process.alive:
            return
        world = self._world
        world.note("death", process, cause.value)
        world.end_process(process)
        detect_s = self._detect_s(cause)
        process.forgotten_at = world.now + detect_s
        for call in process.sent:  # others may wait for the answers
            world.later(detect_s, call.ref.resolve, None, OwnerDiedError(f"{call.number:x}", None, ""))
        world.later(detect_s, self._end_children, process)
        if process.role is not None:
            self._lose_actor(process.role, cause)

    def lose_node(self, node: SimulatedNode) -> None:
        """Let a node die with all its processes."""
        if not node.alive:
            return
        self._world.note("node", node, "dies")
        self._cluster.places.lose(node)
        for process in [process for process in self._world.processes if process.node is node]:
            self.end_process(process, Cause.NODE)
        self._world.later(self._detect_s(Cause.NODE), self._unlist, node)

    def release(self, group: PlacementGroup) -> None:
        """Take back reserved places, and end the processes in them."""
        if group.released:
            return
        for actor in self._cluster.actors:
            if actor.is_in(group):
                self.kill(actor, False)
        self._cluster.places.release(group)

    def _lose_actor(self, actor: Actor, cause: Cause) -> None:
        """Settle what is open with an actor whose process has died."""
        ends = actor.ends or not actor.wanted.restarts
        error = self._error(actor, cause) if ends else self._error_of_restart(actor, cause)
        learns: dict[Process, float] = {}
        pending, actor.pending = actor.pending, {}
        for call in pending:
            if call.answered and self._world.random.random() < 0.5:
                continue  # The answer is on its way, and still arrives.
            call.lost = True
            if call.sender not in learns:
                learns[call.sender] = self._detect_s(cause)
            self._world.later(learns[call.sender], self._cluster.calls.fail, call, error)
        actor.forget_process()
        if ends:
            actor.end(error)
        else:
            actor.state = State.RESTARTING
            self._world.later(self._detect_s(cause), actor.restart)

    def _end_children(self, process: Process) -> None:
        for actor in process.children:
            self.kill(actor, False, Cause.OWNER)
        # Ray gives places back when both their job and the actor that has reserved them are gone.
        orphans = [g for g in self._cluster.places.groups if not (g.creator.alive or g.creator.job.alive)]
        for group in orphans:
            self.release(group)

    def _unlist(self, node: SimulatedNode) -> None:
        node.is_listed = False

    def _detect_s(self, cause: Cause) -> float:
        timing = self._cluster.timing
        return self._world.random.random() * (timing.detect_node_s if cause is Cause.NODE else timing.detect_s)

    def _error(self, actor: Actor, cause: Cause) -> RayError:
        """Return what calls of an actor raise that does not start again."""
        if cause is Cause.OUT_OF_MEMORY:
            return OutOfMemoryError(f"The memory monitor has ended '{actor.name}'.")
        if actor.is_task:
            return NodeDiedError(f"The node of '{actor.name}' died.") if cause is Cause.NODE else WorkerCrashedError()
        return died(actor.name, cause.value)

    def _error_of_restart(self, actor: Actor, cause: Cause) -> RayError:
        if self._world.random.random() < 0.5:
            return self._error(actor, cause)
        return unavailable(f"'{actor.name}' is restarting")
