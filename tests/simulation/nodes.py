"""Nodes of the simulated cluster, and places on them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from multitask.cluster.arithmetic import PARTS
from multitask.cluster.interface import OnNode, Reserved, Search
from multitask.cluster.interface import Process as Wanted
from tests.simulation.messages import share
from tests.simulation.world import Process, World

Amounts = dict[str, int]
"""Resource -> ten-thousandths of it."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long things take, in virtual seconds. Each of them takes a random part of what stands here."""

    delay_s: float = 0.001
    """A message takes from half of this to one and a half times this."""
    slow_share: float = 0.0
    """Share of the messages that are slow, from 0 to 1."""
    slow_s: float = 2.0
    start_s: float = 1.0
    """From the moment at which a process has a place to its first line."""
    detect_s: float = 0.2
    """Until others notice that a process has died."""
    detect_node_s: float = 5.0
    """Until others notice that a node has died."""
    shutdown_s: float = 1.0
    """From the loss of a rank to the end of the other ranks of its group."""


class SimulatedNode:
    """A machine."""

    def __init__(
        self, world: World, timing: Timing, name: str, resources: Mapping[str, float], labels: Mapping[str, str]
    ) -> None:
        self._world, self._timing = world, timing
        self.name, self.resources, self.labels = name, dict(resources), dict(labels)
        self.room = Room(amounts(resources))
        self.alive = True
        self.is_listed = True
        """Whether the cluster lists it among the living nodes; a loss is noticed with a delay."""
        self.paused_until = 0.0
        """No message leaves or reaches the node before this time."""

    def __repr__(self) -> str:
        return self.name

    def delay_from(self, other: "SimulatedNode") -> float:
        """Return how long a message from another node, or from this one, takes that is sent now."""
        timing = self._timing
        chance = self._world.random.random()
        if chance < timing.slow_share:
            delay_s = timing.slow_s * chance / timing.slow_share
        else:
            delay_s = timing.delay_s * (0.5 + chance)
        paused_until = max(self.paused_until, other.paused_until)
        if paused_until > self._world.now:
            delay_s += paused_until - self._world.now
        return delay_s


def amounts(resources: Mapping[str, float]) -> Amounts:
    return {name: round(PARTS * amount) for name, amount in resources.items() if amount}


def asked_for(wanted: Wanted) -> Amounts:
    """Return the resources that a process takes."""
    return amounts({"CPU": wanted.cpus, "GPU": wanted.gpus, **wanted.resources})


class Room:
    """Resources on one node, of which processes and reserved places take their part."""

    def __init__(self, total: Amounts) -> None:
        self.total = total
        self.free = dict(total)

    def has(self, needed: Amounts) -> bool:
        return all(self.free.get(name, 0) >= amount for name, amount in needed.items())

    def taken(self) -> bool:
        """Return whether anything of it is in use."""
        return self.free != self.total

    def take(self, needed: Amounts) -> None:
        for name, amount in needed.items():
            self.free[name] -= amount

    def give_back(self, taken: Amounts) -> None:
        for name, amount in taken.items():
            self.free[name] += amount


class Bundle:
    """One reserved place."""

    def __init__(self, needed: Amounts, labels: Mapping[str, str]) -> None:
        self.needed, self.labels = needed, dict(labels)
        self.node: SimulatedNode | None = None
        self.room = Room({})


class PlacementGroup:
    """A set of reserved places."""

    def __init__(self, bundles: Sequence[Bundle], spread: bool, creator: Process) -> None:
        self.bundles, self.spread, self.creator = bundles, spread, creator
        self.released = False
        self.waiters: list[Any] = []
        """Each is told by its method `arrive` when all places were found."""

    @property
    def bundle_count(self) -> int:
        return len(self.bundles)

    @property
    def is_placed(self) -> bool:
        return all(bundle.node is not None for bundle in self.bundles)


share(PlacementGroup)


@dataclass(frozen=True)
class Taken:
    """What a process has taken of a room."""

    node: SimulatedNode
    room: Room
    needed: Amounts
    places: PlacementGroup | None


class NoPlaceError(Exception):
    """There will never be a place for a process: its node is gone, or its reserved place was given back."""


class Request(Protocol):
    """An actor that waits for a place."""

    wanted: Wanted

    def place(self, taken: Taken) -> None: ...

    def give_up(self, why: NoPlaceError) -> None: ...


class Nodes:
    """All nodes, what is reserved on them, and who waits for a place."""

    def __init__(self, world: World, timing: Timing) -> None:
        self._world, self._timing = world, timing
        self.all: list[SimulatedNode] = []
        self.groups: dict[PlacementGroup, None] = {}
        self._requests: dict[Any, None] = {}
        self._looking = False
        self.processes_on: Callable[[SimulatedNode], int] = lambda node: sum(p.node is node for p in world.processes)

    def add(self, resources: Mapping[str, float], labels: Mapping[str, str]) -> SimulatedNode:
        node = SimulatedNode(self._world, self._timing, f"node {len(self.all)}", resources, labels)
        self.all.append(node)
        self._world.note("node", node.name, "joins")
        self.look()
        return node

    def living(self) -> list[SimulatedNode]:
        return [node for node in self.all if node.alive]

    def lose(self, node: SimulatedNode) -> None:
        """Let a node die; the caller ends its processes."""
        node.alive = False
        for group in self.groups:
            for bundle in group.bundles:
                if bundle.node is node:
                    bundle.node, bundle.room = None, Room({})
        self.look()

    # Places for processes.

    def request(self, request: Request) -> None:
        """Find a place for an actor as soon as there is one."""
        self._requests[request] = None
        self.look()

    def withdraw(self, request: Request) -> None:
        self._requests.pop(request, None)

    def leave(self, taken: Taken) -> None:
        """Take back what a process had."""
        taken.room.give_back(taken.needed)
        self.look()

    def reserve(self, group: PlacementGroup) -> None:
        self.groups[group] = None
        self.look()

    def release(self, group: PlacementGroup) -> None:
        """Take back reserved places; the caller ends the processes in them."""
        group.released = True
        if group in self.groups:
            del self.groups[group]
            for bundle in group.bundles:
                if bundle.node is not None:
                    bundle.node.room.give_back(bundle.needed)
                    bundle.node, bundle.room = None, Room({})
        self.look()

    def look(self) -> None:
        """Look soon for places for all that wait."""
        if not self._looking:
            self._looking = True
            self._world.soon(self._look_now)

    def _look_now(self) -> None:
        self._looking = False
        for group in self.groups:
            if not group.is_placed:
                self._place_group(group)
        for request in list(self._requests):
            try:
                taken = self._find(request.wanted)
            except NoPlaceError as error:
                del self._requests[request]
                request.give_up(error)
                continue
            if taken is not None:
                taken.room.take(taken.needed)
                del self._requests[request]
                request.place(taken)

    def _find(self, wanted: Wanted) -> Taken | None:
        """Return a place for a process.

        Raises:
            NoPlaceError: there will never be one.
        """
        needed = asked_for(wanted)
        if isinstance(wanted.place, Reserved):
            group: PlacementGroup = wanted.place.places
            if group.released:
                raise NoPlaceError("its reserved place was given back")
            bundle = group.bundles[wanted.place.number]
            if bundle.node is None or not bundle.room.has(needed):
                return None
            return Taken(bundle.node, bundle.room, needed, group)
        if isinstance(wanted.place, OnNode):
            nodes = [node for node in self.living() if node.name == wanted.place.node]
            if not nodes:
                raise NoPlaceError("its node is gone")
        else:
            nodes = self._in_random_order()
        fitting = [node for node in nodes if _fits(node, needed, wanted.labels)]
        if not fitting:
            return None
        node = min(fitting, key=self.processes_on) if wanted.place is Search.SPREAD else fitting[0]
        return Taken(node, node.room, needed, None)

    def _in_random_order(self) -> list[SimulatedNode]:
        nodes = self.living()
        self._world.random.shuffle(nodes)
        return nodes

    def _place_group(self, group: PlacementGroup) -> None:
        """Place all bundles of a group that have no place, or none of them."""
        missing = [bundle for bundle in group.bundles if bundle.node is None]
        missing.sort(key=lambda bundle: (len(bundle.labels), sum(bundle.needed.values())), reverse=True)
        nodes = self._in_random_order()
        used = [bundle.node for bundle in group.bundles if bundle.node is not None]
        found: list[tuple[Bundle, SimulatedNode]] = []
        for bundle in missing:
            fitting = [node for node in nodes if _fits(node, bundle.needed, bundle.labels)]
            if not fitting:
                break
            order = min if group.spread else max
            node = order(fitting, key=used.count)
            node.room.take(bundle.needed)
            used.append(node)
            found.append((bundle, node))
        if len(found) < len(missing):
            for bundle, node in found:
                node.room.give_back(bundle.needed)
            return
        for bundle, node in found:
            bundle.node, bundle.room = node, Room(bundle.needed)
        waiters, group.waiters = group.waiters, []
        for waiter in waiters:
            waiter.arrive()


def _fits(node: SimulatedNode, needed: Amounts, labels: Mapping[str, str]) -> bool:
    return labels.items() <= node.labels.items() and node.room.has(needed)
