"""What the engines ask of a cluster: processes, their calls, objects, places, time, and groups of ranks.

The engines reach the cluster through `Cluster` alone. `multitask.cluster.ray_cluster` implements it with Ray. The tests
implement it a second time, as a simulation in one thread with a clock of its own (`tests/simulation`), and one test of
this contract runs against both.

The errors are Ray's own, from `ray.exceptions`, under both implementations:

- RayActorError, or its kind ActorUnavailableError: the process of a call is gone, or could not be reached. The call may
  have been carried out or not.
- OutOfMemoryError: Ray's memory monitor has ended the process of a call.
- ObjectLostError: the process that put an object into the store is gone, or the node that held the object.
- RayTaskError: the called method raised an exception. The error also has the type of this exception.
- GetTimeoutError: there was no answer in time.
- WorkerCrashedError, NodeDiedError: the process that leads a group of ranks is gone.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any, Protocol, TypeVar

from multitask.cluster.arithmetic import Demand, Node
from multitask.cluster.collectives import Collectives

Actor = Any
"""A handle of a process that carries out calls. `actor.method.remote(*arguments)` calls a method and returns a `Ref` to
its answer. An actor without coroutines, which carries out one call at a time, takes the calls of one process in the
order in which they were sent. Other actors may take them in another order, above all when a call has to wait until the
references among its arguments have arrived. Handles can be compared and pickled."""
Places = Any
"""A set of places on nodes that is reserved for a run's processes; see `Cluster.reserve`."""
Value_co = TypeVar("Value_co", covariant=True)
Value = TypeVar("Value")


class Ref(Awaitable[Value_co], Protocol[Value_co]):
    """A reference to an object of the cluster: to a value that `Cluster.put` stored, or to the answer to a call, which
    may have yet to arrive. A coroutine of an actor can await it."""


class Clock(Protocol):
    """The time of this process. The module `time` is one."""

    def monotonic(self) -> float:
        """Return seconds that never run backwards."""

    def time_ns(self) -> int:
        """Return nanoseconds since 1970. Two processes that start one after the other get different numbers."""

    def sleep(self, seconds: float, /) -> None:
        """Wait."""


class Search(Enum):
    """Where the cluster looks for a place for a process that has no reserved one."""

    PARENT = auto()
    """Among the places of the trial that starts the process, if it belongs to a trial of a sweep; else anywhere."""
    ANYWHERE = auto()
    SPREAD = auto()
    """Anywhere, on the node with the fewest processes."""


@dataclass(frozen=True)
class Reserved:
    """One of the places that `Cluster.reserve` reserved."""

    places: Places
    number: int


@dataclass(frozen=True)
class OnNode:
    """A place on one node."""

    node: str


@dataclass(frozen=True, kw_only=True)
class Process:
    """What a process asks of the cluster, and how it runs."""

    place: Search | Reserved | OnNode = Search.ANYWHERE
    cpus: float = 0.0
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that its node needs."""
    restarts: bool = False
    """The cluster starts the process again, by its constructor, whenever it is lost. Calls that were on their way
    fail."""
    threads: int = 1
    """Number of calls that are carried out at the same time. Actors with coroutines ignore it."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """A group of processes that work on one task together: a worker group of Ray Train."""

    number: int
    demand: Demand
    """Resources and labels that each rank asks of the cluster."""
    spread: bool
    """Spread the ranks over nodes; otherwise pack them onto few."""
    start_timeout_s: float
    """For how long a group may wait for its places."""
    folder: Path
    """Folder for the files of the group's controller."""


class GroupRun(Protocol):
    """A group of ranks at work. When a rank is lost, or raises an exception, the cluster ends all ranks and starts new
    ones, again and again, until the function has returned in all ranks of a group."""

    def wait(self, timeout_s: float) -> bool:
        """Wait until the work has ended; return whether it has."""

    def result(self) -> None:
        """Wait for the end of the work.

        Raises:
            GroupStartError: a group found no places in time, or was lost while it started.
            WorkerCrashedError, NodeDiedError, OutOfMemoryError, RayActorError: a process that leads the group is gone,
                and the ranks with it.
            RayTaskError: it raised an exception.
        """

    def cancel(self) -> None:
        """End all ranks and give their places back; `wait` tells when this is done. It has no effect while a group is
        starting."""

    def kill(self) -> None:
        """End the process that leads the group at once, and the ranks with it. For a group that no cancel reaches."""

    def release(self) -> None:
        """Give back the places of a group whose work has ended because the process that leads it was lost or killed.

        It waits some seconds, because ranks that lose their places while this process ends are started again. It has no
        effect where the work has ended otherwise.
        """


class GroupStartError(RuntimeError):
    """The cluster could not start a group of ranks."""


class Cluster(Protocol):
    """The cluster as this process sees it. It can be pickled: every process of a run has one."""

    @property
    def clock(self) -> Clock: ...

    @property
    def metrics(self) -> Any:
        """The classes `Counter`, `Gauge` and `Histogram` of `ray.util.metrics`."""

    # The cluster and this process.

    def session(self) -> AbstractContextManager[None]:
        """Connect this process to the cluster while the block runs."""

    def can_grow(self) -> bool:
        """Return whether the cluster may get more nodes."""

    def nodes(self) -> dict[str, Node]:
        """Return the living nodes by their names."""

    def free_resources(self) -> dict[str, float]:
        """Return the amounts of all resources that no process has taken."""

    def this_node(self) -> str:
        """Return the name of this process's node."""

    def this_actor(self) -> Actor:
        """Return the handle of this process."""

    def process_id(self) -> int:
        """Return the id of this process."""

    def log_to_stderr(self, about: Callable[[], Mapping[str, object]]) -> None:
        """Let this process, which only serves a run, write its log to stderr; see `multitask.cluster.logs`."""

    # Processes and their calls.

    def reserve(
        self, bundles: Sequence[Mapping[str, float]], labels: Sequence[Mapping[str, str]], spread: bool
    ) -> Places:
        """Reserve places, all at once, and return without waiting for them.

        Args:
            bundles: for each place, the resources that it takes.
            labels: for each place, the labels that its node needs.
            spread: spread the places over nodes; otherwise pack them onto few.
        """

    def release(self, places: Places) -> None:
        """Give reserved places back; processes in them end."""

    def start(self, kind: type, arguments: Sequence[Any], process: Process) -> Actor:
        """Start a process that makes an object of a class and carries out calls of its methods.

        The handle is returned at once; the process starts when there is room for it.
        """

    def kill(self, actor: Actor, *, restart: bool = False) -> None:
        """End a process at once.

        Args:
            restart: let the cluster start it again, if it was started with `restarts`.
        """

    def put(self, value: Value) -> Ref[Value]:
        """Store a value. It is lost with this process, and with this node."""

    def get(self, ref: Ref[Value], timeout_s: float | None = None) -> Value:
        """Wait for an object and return it.

        Raises:
            The errors above.
        """

    def fetch(self, answer: list[Ref[Any]]) -> Any:
        """Wait for an answer that holds references in dictionaries, and return it with the objects in their place.

        Args:
            answer: a list with the only reference to the answer, a pair of anything and a list of dictionaries whose
                values are references. The list is emptied.
        """

    def wait(
        self, refs: Sequence[Ref[Any]], *, count: int = 1, timeout_s: float | None = None
    ) -> tuple[list[Ref[Any]], list[Ref[Any]]]:
        """Wait until a number of objects, or errors in their place, have arrived.

        Returns:
            References to those that have arrived, and to the others.
        """

    # Groups of ranks.

    def run_ranks(self, ranks: Ranks, work: Callable[..., None], leader: Actor) -> GroupRun:
        """Let a group of ranks do their work: each of them calls `work(cluster, leader)`.

        Args:
            leader: an actor. Its method `lose` is called with a text whenever the cluster has noticed that a rank is
                lost.
        """

    def collectives(self) -> Collectives:
        """Return what this rank does together with the other ranks of its group."""
