"""Simulated actors: their lives, and the calls that reach them or do not."""

from collections import deque
from collections.abc import Sequence
from enum import Enum, auto
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from ray.exceptions import ActorUnschedulableError, RayError

from multitask.cluster.interface import Process as Wanted
from tests.simulation.executors import Executor, Loop, Threads, has_coroutines
from tests.simulation.messages import copied, share
from tests.simulation.nodes import NoPlaceError, Taken
from tests.simulation.refs import Call, Ref, died, task_error
from tests.simulation.world import Process

if TYPE_CHECKING:
    from tests.simulation.cluster import SimulatedCluster


class State(Enum):
    PENDING = auto()
    """It has no place yet, or its constructor has not ended."""
    ALIVE = auto()
    RESTARTING = auto()
    DEAD = auto()


class Handle:
    """What other processes hold of an actor."""

    def __init__(self, actor: "Actor") -> None:
        self.actor_ = actor
        """The actor; the name ends with `_` because all other names are those of its methods."""

    def __getattr__(self, method: str) -> "Method":
        actor = self.__dict__["actor_"]
        if method.startswith("__") or not hasattr(actor.kind, method):
            raise AttributeError(f"{actor.kind.__name__} has no method {method}")
        found = Method(actor, method)
        setattr(self, method, found)
        return found

    def __hash__(self) -> int:
        return self.actor_.number

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return f"handle of {self.actor_}"


share(Handle)


class Method:
    """A method of an actor that can be called from other processes."""

    __slots__ = ("_actor", "_name")

    def __init__(self, actor: "Actor", name: str) -> None:
        self._actor, self._name = actor, name

    def remote(self, *arguments: Any) -> Ref:
        return self._actor.cluster.calls.send(self._actor, self._name, arguments)


class Actor:
    """An actor, through all processes that it has had."""

    def __init__(
        self,
        cluster: "SimulatedCluster",
        number: int,
        name: str,
        kind: type,
        arguments: Sequence[Any],
        wanted: Wanted,
        is_task: bool,
    ) -> None:
        self.cluster, self.world, self.number, self.name = cluster, cluster.world, number, name
        self.kind, self.wanted, self.is_task = kind, wanted, is_task
        self.owner = self.world.here()
        self.handle = Handle(self)
        self.state = State.PENDING
        self.process: Process | None = None
        self.executor: Executor | None = None
        self.error: RayError | None = None
        """What calls of the dead actor raise."""
        self.ends = False
        """Somebody has asked for its end, so it does not start again."""
        self.pending: dict[Call, None] = {}
        """Calls that are on their way or carried out, or whose answers are on their way."""
        self.arrivals: dict[Process, float] = {}
        """Process -> the time at which its last call of this actor arrives."""
        self.waiting: deque[Call] = deque()
        """Calls that leave when the process has started."""
        self.lanes: dict[Process, deque[Call]] = {}
        """Process -> its calls, in order, from one on whose arguments have not arrived."""
        self.is_async = has_coroutines(kind)
        self.keeps_order = not self.is_async and wanted.threads == 1
        """Ray promises that calls of one process are carried out in the order in which they were sent. It promises
        nothing where there are coroutines or several threads."""
        self.instance: Any = None
        """The object that carries out the calls; None while there is none."""
        self._taken: Taken | None = None
        self.owner.children.append(self)
        self._start = Call(0, self.owner, self, "__init__", arguments)
        self._start.when_complete(lambda: self.cluster.places.request(self))

    def __repr__(self) -> str:
        return self.name

    # Its life.

    def place(self, taken: Taken) -> None:
        """Start a process in a place that was found."""
        self._taken = taken
        self.process = process = self.world.start_process(self.name, taken.node, self.owner.job)
        process.role = self
        self.world.note("start", process, taken.node)
        self.world.later(self.cluster.timing.start_s * self.world.random.random(), self._begin, process)

    def _begin(self, process: Process) -> None:
        if process.alive:
            self.world.start_thread(process, self._construct, process)

    def _construct(self, process: Process) -> None:
        instance = object.__new__(self.kind)
        try:
            instance.__init__(*map(copied, self._start.arrived_arguments()))  # type: ignore[misc]
        except Exception as error:
            self.world.soon(self.cluster.losses.end_actor, self, died(self.name, f"its constructor failed: {error}"))
            return
        self.instance = instance
        if self.is_async:
            self.executor = Loop(self.world, process, self._carry_out_in_loop)
        else:
            self.executor = Threads(self.world, process, self._carry_out, self.wanted.threads)
        self.world.soon(self._become_alive, process)

    def _become_alive(self, process: Process) -> None:
        if not process.alive:
            return
        self.world.note("alive", process)
        self.state = State.ALIVE
        self.arrivals.clear()
        waiting, self.waiting = self.waiting, deque()
        for call in waiting:
            self.cluster.calls.dispatch(call)

    def give_up(self, why: NoPlaceError) -> None:
        """Note that there will never be a place for a process."""
        self.end(ActorUnschedulableError(str(why)))

    def forget_process(self) -> None:
        """Give up the place and the state of the process, which is dead."""
        if self.executor is not None:
            self.executor.close()
        if self._taken is not None:
            self.cluster.places.leave(self._taken)
        self.process = self.executor = self.instance = self._taken = None

    def restart(self) -> None:
        if self.state is State.RESTARTING:
            self.cluster.places.request(self)

    def end(self, error: RayError) -> None:
        """Note that the actor, which has no process, will never have one again."""
        self.state, self.error = State.DEAD, error
        self.cluster.places.withdraw(self)
        waiting, self.waiting = self.waiting, deque()
        for call in waiting:
            self.cluster.calls.fail_soon(call, error)

    def is_in(self, places: Any) -> bool:
        """Return whether its process is in a set of reserved places."""
        return self._taken is not None and self._taken.places is places

    # Calls.

    def deliver(self, call: Call, process: Process) -> None:
        """Take a call that has arrived at a process."""
        if process is self.process and self.executor is not None and not call.lost:
            self.executor.deliver(call)

    def _carry_out(self, call: Call) -> None:
        try:
            value = getattr(self.instance, call.method)(*call.arrived_arguments())
        except Exception as error:
            self._answer_error(call, error)
        else:
            self.cluster.calls.answer(call, value)

    async def _carry_out_in_loop(self, call: Call) -> None:
        try:
            value = getattr(self.instance, call.method)(*call.arrived_arguments())
            if type(value) is CoroutineType:
                value = await value
        except Exception as error:
            self._answer_error(call, error)
        else:
            self.cluster.calls.answer(call, value)

    def _answer_error(self, call: Call, error: Exception) -> None:
        self.cluster.calls.answer(call, None, task_error(call.method, self.world.here(), error))
