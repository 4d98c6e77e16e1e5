"""The kernel of the simulation: virtual time, events, and processes whose threads run one at a time.

Nothing here knows of actors or nodes. `tests.simulation.cluster` builds the cluster on it.

All code runs in one thread of Python. Each thread of a simulated process is a greenlet, which has a stack of its own.
The greenlet that called `World.run` is the *hub*: it takes one event after the other, moves the virtual time, and
switches to the greenlet that the event wakes. A simulated thread that has to wait switches back to the hub.
"""

import random
from asyncio import _set_running_loop  # type: ignore[attr-defined]
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from heapq import heappop, heappush
from math import inf
from typing import Any

from greenlet import getcurrent, greenlet

EPOCH_NS = 1_800_000_000 * 10**9
"""Nanoseconds since 1970 at which the virtual time begins."""


class Killed(BaseException):
    """Thrown into the threads of a simulated process when it dies.

    A dead process gets the same exception from everything that it asks of the cluster, so what runs while its threads
    unwind has no effect on the others.
    """


class StuckError(AssertionError):
    """A run did not end within its bounds. The message says which thread waits for what."""


class DriverKilledError(Exception):
    """The driver's process was killed before its work had ended."""


class Process:
    """A simulated process."""

    __slots__ = (
        "alive",
        "at_death",
        "children",
        "forgotten_at",
        "held",
        "job",
        "name",
        "node",
        "pid",
        "rank",
        "role",
        "sent",
        "threads",
        "world",
    )

    def __init__(self, world: "World", name: str, pid: int, node: Any, job: "Process | None") -> None:
        """Args:
        name: for people, and for faults that aim at it.
        node: the node that it is on; see `tests.simulation.nodes.SimulatedNode`.
        job: the driver that it works for; None for a driver.
        """
        self.world, self.name, self.pid, self.node = world, name, pid, node
        self.job = self if job is None else job
        self.alive = True
        self.forgotten_at = inf
        """When it is dead: the time at which what it has stored is lost on its own node, too."""
        self.threads: dict[Thread, None] = {}
        self.held: list[tuple[Any, ...]] | None = None
        """While the process hangs: the threads that would have gone on, each with its arguments. None while it does
        not hang."""
        self.role: Any = None
        """The actor whose process it is; None for a driver."""
        self.rank: Any = None
        """Its place in a group of ranks, if it has one."""
        self.sent: dict[Any, None] = {}
        """Calls that it has made and that have no answer yet."""
        self.children: list[Any] = []
        """The actors that it has started."""
        self.at_death: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return f"{self.name} ({self.pid})"


class Thread(greenlet):
    """A thread of a simulated process."""

    __slots__ = ("loop", "process", "waits_for")
    process: Process
    loop: Any
    """The event loop that it runs; None for a thread that runs none."""
    waits_for: tuple[Any, ...]
    """What it waits for, for the message of a `StuckError`."""


class World:
    """Time, chance and processes of one simulated run."""

    def __init__(self, seed: int, *, limit_s: float = 3600.0, limit_events: int = 200_000) -> None:
        """Args:
        seed: decides everything that is left to chance.
        limit_s, limit_events: bounds of the virtual time and of the number of events.
        """
        self.random = random.Random(seed)
        self.now = 0.0
        """Virtual seconds since the world began."""
        self.events = 0
        self.limit_s, self.limit_events = limit_s, limit_events
        self.trace: list[tuple[Any, ...]] = []
        """What happened: time, kind of event, and what the kind needs; see `tests.simulation.trace`."""
        self.processes: dict[Process, None] = {}
        """The living processes."""
        self.current: Process | None = None
        """The process whose thread runs; None while the hub runs."""
        self.next_fault_event: float = inf
        """Number of the event before which `on_fault_event` is called."""
        self.on_fault_event: Callable[[], None] = lambda: None
        self._hub = getcurrent()
        self._ready: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._later: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._driver: Process | None = None
        """The process whose work the world goes on for."""
        self._has_ended = False
        """This work has ended, or the process has died."""
        self._sequence = 0
        self._last_pid = 1000
        self._last_ns = EPOCH_NS

    # Events.

    def soon(self, action: Callable[..., None], *arguments: Any) -> None:
        """Do something next, without moving the time."""
        self._ready.append((action, arguments))

    def later(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Do something after a delay."""
        self.at(self.now + delay_s, action, *arguments)

    def at(self, time_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Do something at a time; what was asked for first is done first."""
        self._sequence += 1
        heappush(self._later, (time_s, self._sequence, action, arguments))

    def note(self, kind: str, *about: Any) -> None:
        """Add a line to the trace."""
        self.trace.append((self.now, kind, *about))

    # Time as processes see it.

    def time_ns(self) -> int:
        """Return nanoseconds since 1970, which never repeat."""
        self._last_ns = max(self._last_ns + 1, EPOCH_NS + round(self.now * 1e9))
        return self._last_ns

    def sleep(self, seconds: float) -> None:
        """Let the running thread wait."""
        self.here()
        thread = self.thread()
        self.later(max(0.0, seconds), self._resume, thread)
        self.block("the time", self.now + seconds)

    # Processes and threads.

    def here(self) -> Process:
        """Return the running process.

        Raises:
            Killed: it is dead.
        """
        process = self.current
        assert process is not None, "only a simulated process can ask this of the cluster"
        if not process.alive:
            raise Killed
        return process

    @staticmethod
    def thread() -> Thread:
        """Return the running thread of the running process."""
        thread = getcurrent()
        assert isinstance(thread, Thread)
        return thread

    def start_process(self, name: str, node: Any, job: Process | None) -> Process:
        self._last_pid += 1
        process = Process(self, name, self._last_pid, node, job)
        self.processes[process] = None
        return process

    def start_thread(self, process: Process, work: Callable[..., Any], *arguments: Any) -> None:
        """Let a process do some work in a thread of its own."""
        thread = Thread(work, self._hub)
        thread.process, thread.loop, thread.waits_for = process, None, ("its start",)
        process.threads[thread] = None
        self._ready.append((self._resume, (thread, *arguments)))

    def block(self, *waits_for: Any) -> Any:
        """Let the running thread wait for `wake`.

        Args:
            waits_for: what it waits for, in words and objects.
        """
        thread = self.thread()
        thread.waits_for = waits_for
        return self._hub.switch()

    def wake(self, thread: Thread) -> None:
        """Let a thread go on, after all events that are due now."""
        self._ready.append((self._resume, (thread,)))

    def _resume(self, thread: Thread, *arguments: Any) -> None:
        process = thread.process
        if thread.dead or not process.alive:
            return
        if process.held is not None:
            process.held.append((thread, *arguments))
            return
        self.current = process
        if thread.loop is not None:
            _set_running_loop(thread.loop)
        try:
            thread.switch(*arguments)
        finally:
            self.current = None
            if thread.loop is not None:
                _set_running_loop(None)
        if thread.dead:
            process.threads.pop(thread, None)

    def hang(self, process: Process, seconds: float) -> None:
        """Let a process do nothing for a while, or for ever; it keeps its messages."""
        if process.held is None:
            process.held = []
            if seconds != inf:
                self.later(seconds, self._end_hang, process)

    def _end_hang(self, process: Process) -> None:
        held, process.held = process.held, None
        for resumed in held or ():
            self._ready.append((self._resume, resumed))

    def end_process(self, process: Process) -> None:
        """End a process at once; its threads unwind without an effect on the others. Only the hub may call this."""
        assert getcurrent() is self._hub, "a process is ended by an event"
        process.alive = False
        self._has_ended = self._has_ended or process is self._driver
        self.processes.pop(process, None)
        for thread in list(process.threads):
            self.unwind(process, partial(thread.throw, Killed))
            assert thread.dead, f"a thread of {process} goes on although it was killed"
        process.threads.clear()
        for action in process.at_death:
            action()

    def unwind(self, process: Process, action: Callable[[], object]) -> None:
        """Let code of a dead process unwind."""
        self.current = process
        try:
            action()
        except Killed:
            pass
        finally:
            self.current = None

    # Runs.

    def run(self, process: Process, work: Callable[[], Any]) -> Any:
        """Let a process do some work, and let the world go on until it has done it.

        Returns:
            What the work returns.
        Raises:
            DriverKilledError: the process was killed.
            StuckError: the work did not end within the bounds.
            Exception: what the work raises.
        """
        ended: list[tuple[Any, BaseException | None]] = []

        def main() -> None:
            try:
                ended.append((work(), None))
            except Killed:
                raise
            except BaseException as error:
                ended.append((None, error))
            self._has_ended = process is self._driver

        self.start_thread(process, main)
        self._driver = process
        self._go_on(inf)
        self._driver = None
        if not ended:
            raise DriverKilledError
        result, error = ended[0]
        if error is not None:
            raise error
        return result

    def settle(self, seconds: float) -> None:
        """Let the world go on for some virtual seconds."""
        until = self.now + seconds
        self._go_on(until)
        self.now = max(self.now, until)

    def close(self) -> None:
        """End all processes, so that nothing of this world runs afterwards."""
        while self.processes:
            self.end_process(next(iter(self.processes)))
        self._ready.clear()
        self._later.clear()

    def _go_on(self, until: float) -> None:
        """Take events until the driver's work has ended, or a time is reached."""
        assert getcurrent() is self._hub, "the world is run by the greenlet that made it"
        ready, later = self._ready, self._later
        self._has_ended = False
        while not self._has_ended:
            if ready:
                action, arguments = ready.popleft()
            elif later and later[0][0] <= until:
                self.now, _, action, arguments = heappop(later)
            elif until < inf:
                return
            else:
                raise StuckError(f"Nothing happens any more.\n{self.waiting()}")
            self.events += 1
            if self.events >= self.next_fault_event:
                self.on_fault_event()
            if self.now > self.limit_s or self.events > self.limit_events:
                raise StuckError(f"No end after {self.now:.1f} s and {self.events} events.\n{self.waiting()}")
            action(*arguments)

    def waiting(self) -> str:
        """Say which thread waits for what."""
        lines = [f"  {process} waits for {_words(thread.waits_for)}" for process, thread in self._threads()]
        return "\n".join(lines) or "  There is no process."

    def _threads(self) -> Iterable[tuple[Process, Thread]]:
        return ((process, thread) for process in self.processes for thread in process.threads)


def _words(waits_for: tuple[Any, ...]) -> str:
    return " ".join(word if isinstance(word, str) else repr(word) for word in waits_for)
