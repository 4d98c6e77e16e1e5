"""The ways of calls and answers between processes."""

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError

from tests.simulation.actors import Actor, State
from tests.simulation.losses import Cause
from tests.simulation.messages import copied
from tests.simulation.refs import Call, Ref, task_error, unavailable
from tests.simulation.world import Process

if TYPE_CHECKING:
    from tests.simulation.cluster import SimulatedCluster


class Calls:
    """Sends calls and answers."""

    def __init__(self, cluster: "SimulatedCluster") -> None:
        self._cluster, self._world = cluster, cluster.world
        self.sent = 0

    def send(self, actor: Actor, method: str, arguments: Sequence[Any]) -> Ref:
        """Call a method of an actor."""
        world = self._world
        sender = world.here()
        self.sent += 1
        call = Call(self.sent, sender, actor, method, arguments)
        sender.sent[call] = None
        world.trace.append((world.now, "call", call))
        if self._cluster.faults.aims_at_calls:
            self._cluster.faults.mark(call)
        lane = actor.lanes.get(sender)
        if lane is not None:
            lane.append(call)
        elif not call.references or call.is_complete():
            self.dispatch(call)
        elif actor.keeps_order:
            actor.lanes[sender] = deque([call])
            call.when_complete(lambda: self._empty_lane(actor, sender))
        else:
            call.when_complete(lambda: self.dispatch(call))
        return call.ref

    def _empty_lane(self, actor: Actor, sender: Process) -> None:
        """Let the calls of a lane go, up to one whose arguments have not arrived."""
        lane = actor.lanes[sender]
        while lane:
            if not lane[0].is_complete():
                lane[0].when_complete(lambda: self._empty_lane(actor, sender))
                return
            self.dispatch(lane.popleft())
        del actor.lanes[sender]

    def dispatch(self, call: Call) -> None:
        """Let a call leave its sender's process, if it lives."""
        actor, sender, world = call.actor, call.sender, self._world
        if not sender.alive:
            return
        if actor.state is State.ALIVE:
            delay_s = actor.process.node.delay_from(sender.node)
            if call.fault is not None:
                if call.fault.loses_call:
                    self.fail_soon(call, unavailable("the connection broke"))
                    return
                delay_s += call.fault.call_delay_s
            time_s = world.now + delay_s
            if actor.keeps_order:
                actor.arrivals[sender] = time_s = max(time_s, actor.arrivals.get(sender, 0.0))
            actor.pending[call] = None
            world.at(time_s, actor.deliver, call, actor.process)
        elif actor.state is State.DEAD:
            self.fail_soon(call, actor.error)
        elif actor.state is State.PENDING or world.random.random() < 0.5:
            actor.waiting.append(call)
        else:
            self.fail_soon(call, unavailable(f"'{actor.name}' is restarting"))

    def answer(self, call: Call, value: Any, error: RayError | None = None) -> None:
        """Send an answer from the process of the actor, which has carried out the call."""
        world, actor = self._world, call.actor
        process = world.here()
        try:
            value = copied(value)
        except Exception as problem:  # the value cannot be pickled
            value, error = None, task_error(call.method, process, problem)
        delay_s = process.node.delay_from(call.sender.node)
        if call.fault is not None:
            if call.fault.kills_after:
                world.soon(self._cluster.losses.end_process, process, Cause.KILLED)
                return
            if call.fault.loses_answer:
                call.lost = True
                actor.pending.pop(call, None)
                self.fail_soon(call, unavailable("the connection broke"))
                return
            delay_s += call.fault.answer_delay_s
        call.answered = True
        world.later(delay_s, self._arrive, call, value, error, process.node)

    def _arrive(self, call: Call, value: Any, error: RayError | None, node: Any) -> None:
        """Let an answer reach the caller."""
        call.actor.pending.pop(call, None)
        if call.lost or not call.sender.alive:
            return
        self._world.trace.append((self._world.now, "answer", call, value if error is None else error))
        call.sender.sent.pop(call, None)
        call.ref.made_on = node
        call.ref.resolve(value, error)

    def fail_soon(self, call: Call, error: RayError) -> None:
        """Let the caller learn soon that a call has failed."""
        delay_s = self._cluster.timing.detect_s * self._world.random.random()
        self._world.later(delay_s, self.fail, call, error)

    def fail(self, call: Call, error: RayError) -> None:
        """Let the caller learn that a call has failed."""
        if call.sender.alive:
            self._world.note("failure", call, error)
            call.sender.sent.pop(call, None)
            call.ref.resolve(None, error)
