"""Faults of a schedule: an explicit list, from which a shrinker can drop entries."""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum, auto
from math import inf
from typing import TYPE_CHECKING

from tests.simulation.losses import Cause
from tests.simulation.refs import Call
from tests.simulation.world import Process

if TYPE_CHECKING:
    from tests.simulation.cluster import SimulatedCluster


class Kind(StrEnum):
    """What a fault does. `Fault` says which fields each kind needs."""

    KILL = auto()
    """End the process `target`. If the fault names a call, the process dies when it has carried out the call, before
    the answer is sent."""
    OUT_OF_MEMORY = auto()
    """Let the memory monitor end the process `target`."""
    KILL_NODE = auto()
    """Let the node `target` die."""
    ADD_NODE = auto()
    """Let a node join the cluster, with `resources` and `labels`."""
    LOSE_CALL = auto()
    """A call does not reach its actor, and the caller gets an ActorUnavailableError."""
    LOSE_ANSWER = auto()
    """A call is carried out, and the caller gets an ActorUnavailableError."""
    DELAY_CALL = auto()
    DELAY_ANSWER = auto()
    HANG = auto()
    """Let the process `target` do nothing for `seconds`; it lives on."""
    PAUSE_NODE = auto()
    """Hold back all messages from and to the node `target` for `seconds`."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault. It has no effect if its target does not exist at the time.

    It strikes at a time (`at_s`), before an event of the world (`at_event`), or at the `number`-th call of `method` of
    the actor `target`, counted from 1 in the order of sending.
    """

    kind: Kind
    target: str = ""
    """Name of a process ("driver", "server", "shard 1", "worker pets/0", "ledger", "train", "train controller", "rank
    1") or of a node ("node 0"). Among several processes with one name it is the one that started last."""
    at_s: float | None = None
    at_event: int | None = None
    method: str = ""
    number: int = 1
    seconds: float = inf
    resources: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)


@dataclass
class CallFault:
    """What happens to one call on purpose."""

    loses_call: bool = False
    loses_answer: bool = False
    kills_after: bool = False
    call_delay_s: float = 0.0
    answer_delay_s: float = 0.0

    def add(self, fault: Fault) -> None:
        match fault.kind:
            case Kind.KILL:
                self.kills_after = True
            case Kind.LOSE_CALL:
                self.loses_call = True
            case Kind.LOSE_ANSWER:
                self.loses_answer = True
            case Kind.DELAY_CALL:
                self.call_delay_s += fault.seconds
            case Kind.DELAY_ANSWER:
                self.answer_delay_s += fault.seconds
            case other:
                raise ValueError(f"A fault of kind {other} strikes no call.")


class Faults:
    """Lets the faults of a schedule strike."""

    def __init__(self, cluster: "SimulatedCluster") -> None:
        self._cluster, self._world = cluster, cluster.world
        self.aims_at_calls = False
        self._of_calls: dict[tuple[str, str, int], list[Fault]] = {}
        self._seen: Counter[tuple[str, str]] = Counter()
        self._at_events: list[Fault] = []
        self._world.on_fault_event = self._strike_at_event

    def plan(self, fault: Fault) -> None:
        """Let a fault strike when its time comes."""
        if fault.at_s is not None:
            self._world.at(fault.at_s, self.strike, fault)
        elif fault.at_event is not None:
            self._at_events.append(fault)
            self._at_events.sort(key=lambda other: other.at_event or 0)
            self._set_next()
        else:
            self.aims_at_calls = True
            self._of_calls.setdefault((fault.target, fault.method, fault.number), []).append(fault)

    def mark(self, call: Call) -> None:
        """Note what happens to a call that is being sent."""
        first = call.arguments[0] if call.arguments else None
        methods = (call.method, f"{call.method} {first}") if isinstance(first, str) else (call.method,)
        for name in ((call.actor.name, method) for method in methods):
            self._seen[name] += 1
            for fault in self._of_calls.get((*name, self._seen[name]), ()):
                self._world.note("fault", fault)
                call.fault = call.fault or CallFault()
                call.fault.add(fault)

    def strike(self, fault: Fault) -> None:
        """Let a fault strike now."""
        self._world.note("fault", fault)
        losses = self._cluster.losses
        if fault.kind is Kind.ADD_NODE:
            self._cluster.places.add(fault.resources, fault.labels)
            return
        for node in self._cluster.places.living():
            if node.name == fault.target and fault.kind is Kind.KILL_NODE:
                losses.lose_node(node)
            elif node.name == fault.target and fault.kind is Kind.PAUSE_NODE:
                node.paused_until = max(node.paused_until, self._world.now + fault.seconds)
        process = self._process(fault.target)
        if process is not None:
            match fault.kind:
                case Kind.KILL:
                    losses.end_process(process, Cause.KILLED)
                case Kind.OUT_OF_MEMORY:
                    losses.end_process(process, Cause.OUT_OF_MEMORY)
                case Kind.HANG:
                    self._world.hang(process, fault.seconds)

    def _process(self, name: str) -> Process | None:
        found = [process for process in self._world.processes if process.name == name]
        return found[-1] if found else None

    def _strike_at_event(self) -> None:
        fault = self._at_events.pop(0)
        self._set_next()
        self.strike(fault)

    def _set_next(self) -> None:
        self._world.next_fault_event = (self._at_events[0].at_event or 0) if self._at_events else inf
