"""The cluster of `multitask.cluster.interface`, simulated."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

from ray.exceptions import GetTimeoutError

from multitask.cluster.arithmetic import PARTS, Node
from multitask.cluster.interface import Process as Wanted
from multitask.cluster.interface import Ranks, Reserved
from tests.simulation.actors import Actor, Handle, State
from tests.simulation.calls import Calls
from tests.simulation.collectives import SimulatedCollectives
from tests.simulation.faults import Fault, Faults
from tests.simulation.losses import Losses
from tests.simulation.messages import copied, share
from tests.simulation.nodes import Bundle, Nodes, PlacementGroup, Timing, amounts
from tests.simulation.refs import Ref, Waiter
from tests.simulation.train import SimulatedGroupRun
from tests.simulation.world import Process, World

ONE_NODE: tuple[Node, ...] = (Node({"CPU": 8.0, "memory": 2.0**34}),)


class NoMetric:
    """A metric of `ray.util.metrics` that nobody reads."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def inc(self, value: float = 1.0, tags: Mapping[str, str] | None = None) -> None:
        pass

    def set(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        pass

    def observe(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        pass


class SimulatedClock:
    """The virtual time."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.time_ns, self.sleep = world.time_ns, world.sleep

    def monotonic(self) -> float:
        return self._world.now


class SimulatedCluster:
    """The cluster as every process of a world sees it."""

    metrics = SimpleNamespace(Counter=NoMetric, Gauge=NoMetric, Histogram=NoMetric)

    def __init__(
        self,
        world: World,
        nodes: Iterable[Node] = ONE_NODE,
        *,
        timing: Timing | None = None,
        faults: Iterable[Fault] = (),
        grows: bool = False,
    ) -> None:
        """Args:
        nodes: the machines at the start; drivers run on the first one.
        timing: how long things take.
        faults: what goes wrong.
        grows: what `can_grow` returns.
        """
        self.world, self.timing, self._grows = world, timing or Timing(), grows
        self.clock = SimulatedClock(world)
        self.places = Nodes(world, self.timing)
        self.actors: list[Actor] = []
        self.calls, self.losses, self.faults = Calls(self), Losses(self), Faults(self)
        self._stored = 0
        for node in nodes:
            self.places.add(node.resources, node.labels)
        for fault in faults:
            self.faults.plan(fault)

    # What tests ask.

    def run(self, work: Callable[[], Any], name: str = "driver") -> Any:
        """Let a driver do some work in a process of its own; see `World.run`. The process lives on afterwards."""
        return self.world.run(self.world.start_process(name, self.places.all[0], None), work)

    def leftovers(self) -> list[str]:
        """Return what of a run is still there: living actors, threads, reserved places, resources in use."""
        living = [f"actor {actor} is {actor.state.name}" for actor in self.actors if actor.state is not State.DEAD]
        threads = [f"{process} has a thread" for process in self.world.processes for _ in process.threads]
        groups = [f"{group.bundle_count} places are reserved" for group in self.places.groups]
        rooms = [
            f"{node} has {node.room.free} of {node.room.total}" for node in self.places.living() if node.room.taken()
        ]
        return living + threads + groups + rooms

    # The cluster and this process.

    def session(self) -> AbstractContextManager[None]:
        return nullcontext()

    def can_grow(self) -> bool:
        return self._grows

    def nodes(self) -> dict[str, Node]:
        return {node.name: Node(node.resources, node.labels) for node in self.places.all if node.is_listed}

    def free_resources(self) -> dict[str, float]:
        free: Counter[str] = Counter()
        for node in self.places.living():
            free.update(node.room.free)
        return {name: amount / PARTS for name, amount in free.items() if amount}

    def this_node(self) -> str:
        name: str = self.world.here().node.name
        return name

    def this_actor(self) -> Handle:
        handle: Handle = self.world.here().role.handle
        return handle

    def process_id(self) -> int:
        return self.world.here().pid

    def log_to_stderr(self, about: Callable[[], Mapping[str, object]]) -> None:
        """Do nothing: all processes share the log of the test."""

    # Places.

    def reserve(
        self, bundles: Sequence[Mapping[str, float]], labels: Sequence[Mapping[str, str]], spread: bool
    ) -> PlacementGroup:
        needed = [Bundle(amounts(bundle), wanted) for bundle, wanted in zip(bundles, labels, strict=True)]
        group = PlacementGroup(needed, spread, self.world.here())
        self.places.reserve(group)
        return group

    def release(self, places: PlacementGroup) -> None:
        process = self.world.here()
        self.world.later(process.node.delay_from(process.node), self.losses.release, places)

    # Processes and their calls.

    def start(self, kind: type, arguments: Sequence[Any], process: Wanted) -> Handle:
        return self.start_actor(name_of(kind, arguments, process), kind, arguments, process).handle

    def start_actor(
        self, name: str, kind: type, arguments: Sequence[Any], wanted: Wanted, is_task: bool = False
    ) -> Actor:
        """Start an actor under a name of the caller's choice.

        Args:
            is_task: it stands for a task of Ray, whose loss has other errors than that of an actor.
        """
        actor = Actor(self, len(self.actors), name, kind, arguments, wanted, is_task)
        self.actors.append(actor)
        return actor

    def kill(self, actor: Handle, *, restart: bool = False) -> None:
        node = self.world.here().node
        self.world.later(node.delay_from(node), self.losses.kill, actor.actor_, restart)

    def put(self, value: Any) -> Ref:
        process = self.world.here()
        self._stored += 1
        ref = Ref(self.world, process, self._stored, None)
        ref.made_on = process.node
        ref.resolve(copied(value))
        return ref

    def get(self, ref: Ref, timeout_s: float | None = None) -> Any:
        process = self.world.here()
        if not ref.ready:
            self._wait([ref], 1, timeout_s)
            if not ref.ready:
                raise GetTimeoutError(f"{ref} did not arrive within {timeout_s} s.")
        if not ref.is_here(process):
            self._bring([ref], process)
        return ref.take()

    def fetch(self, answer: list[Ref]) -> Any:
        about, parts = self.get(answer.pop())
        refs = [ref for part in parts for ref in part.values()]
        self._wait(refs, len(refs), None)
        self._bring(refs, self.world.here())
        return about, [{name: ref.take() for name, ref in part.items()} for part in parts]

    def wait(
        self, refs: Sequence[Ref], *, count: int = 1, timeout_s: float | None = None
    ) -> tuple[list[Ref], list[Ref]]:
        if not refs:
            return [], []
        if not 0 < count <= len(refs) or len(set(refs)) < len(refs):
            raise ValueError(f"Waiting for {count} of {len(refs)} references, which have to differ.")
        self._wait(refs, count, timeout_s)
        ready = [ref for ref in refs if ref.ready][:count]
        taken = set(ready)
        return ready, [ref for ref in refs if ref not in taken]

    # Groups of ranks.

    def run_ranks(self, ranks: Ranks, work: Callable[..., None], leader: Handle) -> SimulatedGroupRun:
        return SimulatedGroupRun(self, ranks, work, leader)

    def collectives(self) -> SimulatedCollectives:
        return SimulatedCollectives(*self.world.here().rank)

    # Internals.

    def _wait(self, refs: Sequence[Ref], count: int, timeout_s: float | None) -> None:
        """Wait until a number of objects have arrived, or the time is over."""
        world = self.world
        world.here()
        missing = [ref for ref in refs if not ref.ready]
        left = count - (len(refs) - len(missing))
        if left <= 0 or timeout_s == 0:
            return
        waiter = Waiter(world, world.thread(), left)
        for ref in missing:
            ref.waiters.append(waiter)
        if timeout_s is not None:
            world.later(timeout_s, waiter.time_out)
        world.block(left, "of", missing)
        if waiter.timed_out:
            for ref in missing:
                if not ref.ready:
                    ref.waiters.remove(waiter)

    def _bring(self, refs: Iterable[Ref], process: Process) -> None:
        """Bring values from other processes to this one."""
        missing = [ref for ref in refs if not ref.is_here(process)]
        if missing:
            self.world.sleep(max(process.node.delay_from(ref.owner.node) for ref in missing))
            for ref in missing:
                ref.fetched(process)


share(SimulatedCluster)
share(SimulatedClock)


def name_of(kind: type, arguments: Sequence[Any], wanted: Wanted) -> str:
    """Return a name for a new actor: its class, and the first text among its arguments or else its reserved place."""
    name = kind.__name__.removesuffix("Actor").lower()
    texts = [argument for argument in arguments if isinstance(argument, str)]
    if texts:
        return f"{name} {texts[0]}"
    if isinstance(wanted.place, Reserved) and wanted.place.number > 0:
        return f"{name} {wanted.place.number}"
    return name
