"""References to objects of the simulated cluster, the calls that make them, and how waiting for them ends."""

import pickle
import traceback
from collections.abc import Callable, Generator, Sequence
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, OwnerDiedError, RayTaskError

from tests.simulation.messages import copied, holds_arrays, share
from tests.simulation.world import Process, Thread, World


class Ref:
    """A reference to a stored value, or to the answer to a call."""

    __slots__ = ("about", "error", "holders", "made_on", "number", "owner", "ready", "value", "waiters", "world")

    def __init__(self, world: World, owner: Process, number: int, about: Any) -> None:
        """Args:
        owner: the process that has made it; the object is lost with it.
        about: the call that it is the answer to; None for a stored value.
        """
        self.world, self.owner, self.number, self.about = world, owner, number, about
        self.ready = False
        self.value: Any = None
        self.error: BaseException | None = None
        self.made_on: Any = None
        """The node on which the value was made, and which holds it if it has arrays; small answers travel at once."""
        self.holders: set[Process] | None = None
        """Processes that have fetched the value, beside the owner."""
        self.waiters: list[Any] = []
        """Each is told by its method `arrive` when the value has arrived."""

    def __repr__(self) -> str:
        return f"object {self.number}" if self.about is None else f"the answer to {self.about}"

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return self is other

    def resolve(self, value: Any, error: BaseException | None = None) -> None:
        """Let the value, or an error in its place, arrive."""
        if self.ready:
            return
        self.ready, self.value, self.error = True, value, error
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter.arrive()

    def is_here(self, process: Process) -> bool:
        """Return whether a process need not fetch the value from another one."""
        return process is self.owner or self.error is not None or (self.holders is not None and process in self.holders)

    def fetched(self, process: Process) -> None:
        """Note that a process has the value now."""
        if self.holders is None:
            self.holders = set()
        self.holders.add(process)

    def take(self) -> Any:
        """Return a copy of the value that has arrived.

        Raises:
            The error that has arrived in its place, or that of a lost object.
        """
        if self.error is not None:
            if type(self.error) is RayTaskError:  # It gets the type of the exception that the method raised, too.
                self.error = self.error.as_instanceof_cause()
            raise self.error.with_traceback(None)
        if not self.owner.alive and not self._is_still_on(self.world.here().node):
            raise OwnerDiedError(f"{self.number:x}", None, "")
        if self.made_on is not None and not self.made_on.alive and holds_arrays(self.value):
            raise ObjectLostError(f"{self.number:x}", None, "")
        return copied(self.value)

    def _is_still_on(self, node: Any) -> bool:
        """Return whether a node keeps the object although its owner is dead, because it does not know of the death."""
        return self.made_on is node and self.world.now < self.owner.forgotten_at

    def __await__(self) -> Generator[Any, None, Any]:
        process = self.world.here()
        loop = process.role.executor
        if not self.ready:
            future = loop.create_future()
            self.waiters.append(Future(future))
            yield from future
        if not self.is_here(process):
            future = loop.create_future()
            self.world.later(process.node.delay_from(self.owner.node), Future(future).arrive)
            yield from future
            self.fetched(process)
        return self.take()


share(Ref)


class Future:
    """A future of asyncio that is told when something has happened."""

    __slots__ = ("_future",)

    def __init__(self, future: Any) -> None:
        self._future = future

    def arrive(self) -> None:
        if not self._future.done():
            self._future.set_result(None)


class Waiter:
    """A thread that waits for several things, or for a time."""

    __slots__ = ("_left", "_thread", "_world", "timed_out")

    def __init__(self, world: World, thread: Thread, count: int) -> None:
        self._world, self._thread, self._left = world, thread, count
        self.timed_out = False

    def arrive(self) -> None:
        """Note that one of the things has happened."""
        self._left -= 1
        if self._left == 0:
            self._world.wake(self._thread)

    def time_out(self) -> None:
        """Note that the time is over."""
        if self._left > 0:
            self._left = 0
            self.timed_out = True
            self._world.wake(self._thread)


class Countdown:
    """Does something when several objects have arrived."""

    __slots__ = ("_action", "_left")

    def __init__(self, count: int, action: Callable[[], None]) -> None:
        self._left, self._action = count, action

    def arrive(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._action()


class Call:
    """A call of a method of an actor."""

    __slots__ = ("actor", "answered", "arguments", "fault", "lost", "method", "number", "ref", "references", "sender")

    def __init__(self, number: int, sender: Process, actor: Any, method: str, arguments: Sequence[Any]) -> None:
        self.number, self.sender, self.actor, self.method = number, sender, actor, method
        self.references: list[tuple[int, Ref]] = []
        """Arguments that are references: their places and themselves. Their objects take these places on arrival."""
        self.arguments: list[Any] = []
        for argument in arguments:
            if type(argument) is Ref:
                self.references.append((len(self.arguments), argument))
            self.arguments.append(copied(argument))
        self.fault: Any = None
        """What happens to this call on purpose; see `tests.simulation.faults.CallFault`."""
        self.answered = False
        """The method was carried out, and the answer is on its way or has arrived."""
        self.lost = False
        """The caller gets an error."""
        self.ref = Ref(sender.world, sender, number, self)

    def __repr__(self) -> str:
        return f"call {self.number} of {self.actor.name}.{self.method} by {self.sender.name}"

    def is_complete(self) -> bool:
        """Return whether all references among the arguments have arrived."""
        return all(ref.ready for _, ref in self.references)

    def when_complete(self, action: Callable[[], None]) -> None:
        """Do something when all references among the arguments have arrived."""
        missing = [ref for _, ref in self.references if not ref.ready]
        if missing:
            countdown = Countdown(len(missing), action)
            for ref in missing:
                ref.waiters.append(countdown)
        else:
            action()

    def arrived_arguments(self) -> list[Any]:
        """Return the arguments with objects in place of references.

        Raises:
            The error of an object.
        """
        for place, ref in self.references:
            self.arguments[place] = ref.take()
        return self.arguments


def task_error(method: str, process: Process, error: Exception) -> RayTaskError:
    """Return what a caller gets when a method raises an exception; see `Ref.take` for its type."""
    cause: Exception = error.cause if isinstance(error, RayTaskError) else error
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    lines = [f'  File "{code.co_filename}", line {line}, in {code.co_name}' for code, line in frames]
    text = "\n".join(["Traceback (most recent call last):", *lines, f"{type(cause).__name__}: {cause}"])
    try:
        cause = pickle.loads(pickle.dumps(cause))
    except Exception:  # RayTaskError replaces a cause that cannot be pickled
        cause = cause.with_traceback(None)
    return RayTaskError(method, text, cause, proctitle=process.name, pid=process.pid, ip="127.0.0.1")


def died(actor: str, why: str) -> ActorDiedError:
    """Return the error of a call whose actor is dead."""
    error = ActorDiedError()
    error.error_msg = f"The actor '{actor}' died: {why}."
    return error


def unavailable(why: str) -> ActorUnavailableError:
    """Return the error of a call that did not reach its actor, or whose answer did not arrive."""
    return ActorUnavailableError(why, None)
