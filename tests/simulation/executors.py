"""How the process of a simulated actor carries out calls: in threads, or in an event loop."""

import asyncio
import inspect
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from tests.simulation.refs import Call
from tests.simulation.world import Killed, Process, StuckError, Thread, World

LONGEST_TURN = 100_000
"""Number of callbacks that a loop may run without waiting for anything."""


class Executor(Protocol):
    """Carries out the calls that arrive."""

    def deliver(self, call: Call) -> None:
        """Take a call that has arrived."""

    def close(self) -> None:
        """Forget all calls: the process is dead."""


def has_coroutines(kind: type) -> bool:
    return any(inspect.iscoroutinefunction(value) for _, value in inspect.getmembers(kind, inspect.isfunction))


class Threads:
    """Carries out calls in the order of their arrival, in one thread or several."""

    def __init__(self, world: World, process: Process, carry_out: Callable[[Call], None], threads: int) -> None:
        self._world, self._process, self._carry_out = world, process, carry_out
        self._arrived: deque[Call] = deque()
        self._idle: list[Thread] = []
        self._not_started = threads

    def deliver(self, call: Call) -> None:
        self._arrived.append(call)
        if self._idle:
            self._world.wake(self._idle.pop())
        elif self._not_started:
            self._not_started -= 1
            self._world.start_thread(self._process, self._work)

    def close(self) -> None:
        self._arrived.clear()

    def _work(self) -> None:
        while True:
            while self._arrived:
                self._carry_out(self._arrived.popleft())
            self._idle.append(self._world.thread())
            self._world.block("a call")


class Loop:
    """A small event loop of asyncio, in which the calls of one actor take turns.

    `asyncio.Task`, `asyncio.Event` and `asyncio.sleep` work in it unchanged, and the order of its callbacks depends on
    nothing but the order of the calls.
    """

    def __init__(self, world: World, process: Process, carry_out: Callable[[Call], Awaitable[None]]) -> None:
        self._world, self._process, self._carry_out = world, process, carry_out
        self._callbacks: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._thread: Thread | None = None
        self._is_idle = False
        self._calls: dict[Call, asyncio.Task[Any]] = {}
        world.start_thread(process, self._turn)

    def deliver(self, call: Call) -> None:
        self._calls[call] = asyncio.Task(self._run(call), loop=self)  # type: ignore[arg-type]

    def close(self) -> None:
        """Close the coroutines of calls that have not ended; what they do meanwhile has no effect."""
        self._callbacks.clear()
        for task in list(self._calls.values()):
            self._world.unwind(self._process, task.get_coro().close)
        self._calls.clear()
        self._callbacks.clear()

    async def _run(self, call: Call) -> None:
        await self._carry_out(call)
        del self._calls[call]

    def _turn(self) -> None:
        self._thread = self._world.thread()
        self._thread.loop = self
        while True:
            self._run_callbacks()
            self._is_idle = True
            self._world.block("calls, and answers for", *self._calls)

    def _run_callbacks(self) -> None:
        for _ in range(LONGEST_TURN):
            if not self._callbacks:
                return
            callback, arguments = self._callbacks.popleft()
            callback(*arguments)
            if not self._process.alive:
                raise Killed
        raise StuckError(f"The calls of {self._process} never wait: {list(self._calls)}")

    # What asyncio asks of a loop.

    def call_soon(self, callback: Callable[..., Any], *arguments: Any, context: Any = None) -> None:  # noqa: ARG002
        self._callbacks.append((callback, arguments))
        if self._is_idle and self._thread is not None:
            self._is_idle = False
            self._world.wake(self._thread)

    def call_later(
        self,
        delay: float,
        callback: Callable[..., Any],
        *arguments: Any,
        context: Any = None,  # noqa: ARG002
    ) -> "Timer":
        timer = Timer(self, callback, arguments)
        self._world.later(delay, timer.ring)
        return timer

    def create_future(self) -> Any:
        return asyncio.Future(loop=self)  # type: ignore[arg-type]

    def create_task(self, coroutine: Any, *, name: str | None = None, context: Any = None) -> Any:  # noqa: ARG002
        return asyncio.Task(coroutine, loop=self)  # type: ignore[arg-type]

    def time(self) -> float:
        return self._world.now

    def get_debug(self) -> bool:
        return False

    def is_closed(self) -> bool:
        return not self._process.alive

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Do nothing: errors of calls are sent to their callers, and dead processes tell nobody."""


class Timer:
    """A callback that waits for its time."""

    def __init__(self, loop: Loop, callback: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._loop, self._callback, self._arguments = loop, callback, arguments
        self._is_cancelled = False

    def ring(self) -> None:
        if not self._is_cancelled:
            self._loop.call_soon(self._callback, *self._arguments)

    def cancel(self) -> None:
        self._is_cancelled = True
