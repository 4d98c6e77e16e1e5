"""How much can the parameter server move, and where does it saturate? Pushes and pulls of real actors, against a copy
from memory to memory.

The server is the project's: unchanged ServerActor and ShardActor over the one group that all tensors of MobileNetV2
(3.5M parameters) or ResNet-50 (25.6M) make, with SGD and momentum, one update per push. The workers are actors that
import numpy and no torch, push a fixed gradient as soon as they are answered, and copy the values into a buffer of
their own. The project's modules import torch, so none of its classes may reach these workers: wrappers hold the
server's actors, the server builds the Push from numbers, and Reply and GroupValues travel as tuples. Every array is
copied as in training.

Every session starts a server and increases the number of workers from 1 to 16, so that no worker is idle beside a
smaller number. The copy is timed in the first worker while it is alone. GB/s counts the bytes of gradients and of
values. `busy` is the share of time in which the first shard checks, updates or publishes. `cores` is the number of
cores that all of this uses, and `others` the number that other processes use.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from types import SimpleNamespace
from typing import Any

import ray
from ray.util import register_serializer
from torchvision.models import get_model

from benchmarks._common import Goal, at_least, at_most, environment, finish, make_parser
from benchmarks._pusher import Pusher, ServerShell, ShardShell, Trip
from benchmarks._turns import TIMEOUT_S, ProcessorTime
from multitask.cluster.ray_cluster import RayCluster
from multitask.cluster.session import ray_session
from multitask.engines.server_actors import Refs, ServerActor, ShardActor
from multitask.server.clock import Clock
from multitask.server.group import ParameterGroup
from multitask.server.layout import flatten, make_layout, named_tensors, tensor_roles
from multitask.server.messages import Gradients, GroupValues, Key, Push, Reply, StepRecord
from multitask.server.optimizers import make_optimizer
from multitask.server.parameter_server import OtherShards, ParameterServer, Rules, ServedTask
from multitask.server.progress import Progress, WorkerProgress
from multitask.server.schedules import constant
from multitask.server.shard import Shard, Update

MODELS = ("mobilenet_v2", "resnet50")
GOAL_MODEL = "resnet50"
SHARDS, WORKERS = (1, 2, 4), (1, 2, 4, 8, 16)
COPIES_GOAL, KEPT_GOAL = 9.0, 0.8
GROUP, TASK = "shared:numbers", "numbers"
NEVER = 1_000_000_000
COPY_REPEATS = 21
Session = dict[int, dict[str, float]]
"""Number of workers -> what was measured with this number."""


class Numbers:
    """The part of a Job that ServerActor and ShardActor use: one group that all workers share."""

    spec = SimpleNamespace(tasks=(SimpleNamespace(name=TASK),))

    def __init__(self, model: str, shards: int) -> None:
        network = get_model(model).train()
        tensors = named_tensors(network)
        self._layout = make_layout(tensors, *tensor_roles(network))
        values, counters = flatten(tensors, self._layout)
        self._start = GroupValues(values[: self._layout.pushed].numpy(), counters.numpy())
        self.ranges = self._layout.ranges(shards)
        self.workers = {f"{TASK}/{rank}": TASK for rank in range(max(WORKERS))}
        self.progress = Progress(workers={name: WorkerProgress() for name in self.workers})

    @property
    def floats(self) -> int:
        return self._layout.pushed

    def make_shard(self, number: int) -> Shard:
        def sgd(decayed: Any, plain: Any) -> Any:
            return make_optimizer("sgd", decayed, plain, weight_decay=0.0, momentum=0.9)

        groups = {GROUP: ParameterGroup(self._layout, self._start, sgd, part=self.ranges[number])}
        return Shard(groups) if number else ClockedShard(groups)

    def pushed_bytes(self, _task: str) -> int:
        return 4 * self._layout.pushed

    def make_server(
        self, others: OtherShards | None, on_record: Callable[[StepRecord], None], clock: Clock
    ) -> ParameterServer:
        tasks = {TASK: ServedTask(shared=(GROUP,))}
        rules = Rules(evaluate_every_rounds=NEVER)
        shard, schedule = self.make_shard(0), constant(1e-3)
        return ParameterServer(shard, tasks, self.workers, schedule, rules, self.progress, others, on_record, clock)


class ClockedShard(Shard):
    """The first shard, which remembers how long each push took it until that push is answered."""

    def __init__(self, groups: Mapping[str, ParameterGroup]) -> None:
        super().__init__(groups)
        self.check_s: dict[Key, float] = {}
        self.update_s: dict[Key, float] = {}

    def stash(self, key: Key, gradients: Gradients, names: Any) -> str | None:
        start = time.monotonic()
        problem = super().stash(key, gradients, names)
        self.check_s[key] = time.monotonic() - start
        return problem

    def apply(self, update: Update, done: Any) -> None:
        start = time.monotonic()
        super().apply(update, done)
        self.update_s |= dict.fromkeys(done, time.monotonic() - start)


class NumbersShard(ShardActor):
    def __init__(self) -> None:
        travel_as_tuples()
        super().__init__(RayCluster())


class NumbersServer(ServerActor):
    """The server, with methods that a process without torch can call."""

    def __init__(self) -> None:
        travel_as_tuples()
        super().__init__(RayCluster())
        self._publish_s = 0.0

    def begin(self, job: Any, shards: Sequence[Any] = (), *incarnations: int) -> None:
        super().begin(job, shards, *incarnations)
        self._refs, self._published.refs = self._published.refs, self._clocked_refs  # type: ignore[method-assign]

    async def push_numbers(
        self, worker: str, step: int, version: int, gradients: Gradients, *problems: str | None
    ) -> Any:
        arrived = time.monotonic()
        push = Push(worker, step, version, loss=0.0, images=1, seconds=0.0)
        reply, refs = await self.push(push, gradients, *problems)
        shard = self._server.shard
        assert isinstance(shard, ClockedShard)
        checked_s, updated_s = shard.check_s.pop(push.key), shard.update_s.pop(push.key)
        moments = arrived, time.monotonic(), checked_s, updated_s, self._publish_s
        return reply, refs, moments

    def _clocked_refs(self, names: Any) -> Refs:
        start = time.monotonic()
        refs = self._refs(names)
        self._publish_s = time.monotonic() - start
        return refs


def travel_as_tuples() -> None:
    """Let replies and values travel as tuples, for readers that cannot import our classes without torch."""
    register_serializer(GroupValues, serializer=lambda group: (group.values, group.counters), deserializer=tuple)
    register_serializer(Reply, serializer=lambda reply: (reply.version, reply.rejected), deserializer=tuple)


class Workers:
    """Actors that push; they are started when they are needed."""

    def __init__(self, numbers: Numbers, server: Any, shards: Sequence[Any]) -> None:
        self._names = list(numbers.workers)
        self._arguments = (numbers.ranges, GROUP, server, shards)
        self.actors: list[Any] = []

    def grow(self, count: int) -> None:
        actor: Any = ray.remote(Pusher).options(num_cpus=0)
        self.actors += [actor.remote(name, *self._arguments) for name in self._names[len(self.actors) : count]]
        assert not any(ray.get([actor.imports_torch.remote() for actor in self.actors], timeout=TIMEOUT_S)), (
            "a worker imports torch: then its start and its memory are not what this benchmark says"
        )


@contextmanager
def started(numbers: Numbers, shards: int) -> Iterator[tuple[Any, Workers]]:
    """Start a server, to which workers can be added; all of them end with the block."""
    reference = ray.put(numbers)
    shard: Any = ray.remote(ShardShell).options(num_cpus=0)
    first: Any = ray.remote(ServerShell).options(num_cpus=0)
    others: list[Any] = [shard.remote(NumbersShard) for _ in range(1, shards)]
    server: Any = first.remote(NumbersServer)
    incarnations = [shard.begin.remote(reference, number) for number, shard in enumerate(others, start=1)]
    workers = Workers(numbers, server, others)
    try:
        ray.get(server.begin.remote(reference, others, *incarnations), timeout=TIMEOUT_S)
        yield server, workers
    finally:
        for actor in (*workers.actors, server, *others):
            ray.kill(actor)


def run_session(numbers: Numbers, shards: int, counts: Sequence[int], warm_up_s: float, seconds: float) -> Session:
    found: Session = {}
    with started(numbers, shards) as (server, workers):
        for count in counts:
            workers.grow(count)
            if not found:
                copy_s = ray.get(workers.actors[0].memcpy_s.remote(COPY_REPEATS), timeout=TIMEOUT_S)
            found[count] = measure(workers.actors, numbers, warm_up_s, seconds, copy_s)
            ray.get(server.call.remote("drain"), timeout=TIMEOUT_S)
    return found


def measure(
    actors: Sequence[Any], numbers: Numbers, warm_up_s: float, seconds: float, copy_s: float
) -> dict[str, float]:
    """Let all workers push for some seconds, and measure without the warm-up before that."""
    before, start = ProcessorTime.now(), time.monotonic()
    end = start + warm_up_s + seconds
    trips = [
        trip for trips in ray.get([actor.run.remote(end) for actor in actors], timeout=TIMEOUT_S) for trip in trips
    ]
    own, others = ProcessorTime.now().since(before)
    span = time.monotonic() - start
    counted = [trip for trip in trips if end - seconds < trip.copied <= end]
    assert counted, f"no push was answered within {seconds:g} s: use more --seconds"
    moved = 2 * 4 * numbers.floats * len(counted)
    stages = {name: median(1000 * stage_s(trip)[name] for trip in counted) for name in stage_s(counted[0])}
    busy = sum(trip.check_s + trip.update_s + trip.publish_s for trip in counted) / seconds
    trip_s = median(trip.copied - trip.begun for trip in counted)
    return {
        "GB/s": moved / seconds / 1e9,
        "ms": 1000 * trip_s,
        "memcpy": 1000 * copy_s,
        "memcpys": trip_s / copy_s,
        "busy": busy,
        "cores": own / span,
        "others": others / span,
        **stages,
    }


def stage_s(trip: Trip) -> dict[str, float]:
    """Where the seconds of one push and pull went: the worker puts its gradient, the call gets there, the server checks
    that it is finite, updates, publishes the values and does the rest, the answer gets back, the worker maps the values
    and copies them. Of several shards, the first one's; the others' are in `rest`."""
    inside = trip.check_s + trip.update_s + trip.publish_s
    return {
        "put": trip.sent - trip.begun,
        "there": trip.arrived - trip.sent,
        "check": trip.check_s,
        "update": trip.update_s,
        "publish": trip.publish_s,
        "rest": trip.applied - trip.arrived - inside,
        "back": trip.answered - trip.applied,
        "map": trip.fetched - trip.answered,
        "copy": trip.copied - trip.fetched,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--shards", nargs="+", type=int, default=list(SHARDS))
    parser.add_argument("--workers", nargs="+", type=int, default=list(WORKERS), help=f"at most {max(WORKERS)}")
    parser.add_argument("--rounds", type=int, default=3, help="sessions of every model with every number of shards")
    parser.add_argument("--seconds", type=float, default=4.0, help="measured with each number of workers")
    parser.add_argument("--warm-up", type=float, default=2.0, metavar="SECONDS", help="left out before them")
    arguments = parser.parse_args()
    counts = sorted(arguments.workers)
    around = environment()
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - actors would run at nice 15, other processes at 0
    sessions: dict[tuple[str, int], list[Session]] = {
        (model, shards): [] for model in arguments.models for shards in arguments.shards
    }
    with ray_session():
        for number in range(arguments.rounds):
            # The order changes with each round, so that a load from outside that comes and goes meets all alike.
            for model, shards in sorted(sessions, reverse=bool(number % 2)):
                session = run_session(Numbers(model, shards), shards, counts, arguments.warm_up, arguments.seconds)
                sessions[model, shards].append(session)
                outside = median(found["others"] for found in session.values())
                print(f"Round {number + 1}, {model}, {shards} shards: {outside:.2f} cores used by others", flush=True)
    finish(
        arguments.out,
        tables={
            "Push and pull: medians over rounds": [
                throughput_row(*key, count, found) for key, found in sessions.items() for count in counts
            ],
            f"One push and pull in ms, {counts[0]} worker(s): medians": [
                stages_row(*key, found, counts[0]) for key, found in sessions.items()
            ],
            f"One push and pull in ms, {counts[-1]} worker(s): medians": [
                stages_row(*key, found, counts[-1]) for key, found in sessions.items()
            ],
        },
        environment=around,
        goals=make_goals(sessions, counts),
        settings={
            "rounds": arguments.rounds,
            "seconds": arguments.seconds,
            "warm_up_s": arguments.warm_up,
            "workers_import_torch": False,
            "floats": {model: Numbers(model, 1).floats for model in arguments.models},
            "sessions": [
                {"model": model, "shards": shards, "workers": count, **session[count]}
                for (model, shards), found in sessions.items()
                for session in found
                for count in counts
            ],
        },
    )


def middle(sessions: Sequence[Session], count: int, key: str) -> float:
    return median(session[count][key] for session in sessions)


def throughput_row(model: str, shards: int, count: int, sessions: Sequence[Session]) -> dict[str, Any]:
    peak = max(middle(sessions, workers, "GB/s") for workers in sessions[0])
    columns = ("GB/s", "ms", "memcpys", "busy", "cores", "others")
    found = {key: middle(sessions, count, key) for key in columns}
    lowest = min(session[count]["GB/s"] for session in sessions)
    highest = max(session[count]["GB/s"] for session in sessions)
    spread = {"GB/s": found.pop("GB/s"), "lowest": lowest, "highest": highest}
    return {"model": model, "shards": shards, "workers": count, **spread, "of peak": spread["GB/s"] / peak, **found}


def stages_row(model: str, shards: int, sessions: Sequence[Session], count: int) -> dict[str, Any]:
    stages = stage_s(Trip(*[0.0] * len(Trip._fields)))
    total = {"all": middle(sessions, count, "ms"), "memcpy": middle(sessions, count, "memcpy")}
    return {"model": model, "shards": shards, **{name: middle(sessions, count, name) for name in stages}, **total}


def make_goals(sessions: dict[tuple[str, int], list[Session]], counts: Sequence[int]) -> list[Goal]:
    goals = []
    for (model, shards), found in sessions.items():
        kept = throughput_row(model, shards, counts[-1], found)["of peak"]
        goals.append(at_least(f"{model}, {shards} shards, {counts[-1]} workers: GB/s / the peak's", kept, KEPT_GOAL))
        if (model, shards, counts[0]) == (GOAL_MODEL, 1, 1):
            copies = middle(found, 1, "memcpys")
            goals.append(at_most(f"{model}, 1 shard, 1 worker: push+pull / one copy of its bytes", copies, COPIES_GOAL))
    return goals


if __name__ == "__main__":
    main()
