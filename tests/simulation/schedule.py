"""Schedules: everything that a simulated run is decided by, made from a seed."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, Literal

from tests.simulation.behaviour import Behaviour, StepFault, step_of
from tests.simulation.faults import Fault as ClusterFault
from tests.simulation.faults import Kind
from tests.simulation.nodes import Timing
from tests.simulation.toy import ToyConfig, ToyTask

ENGINES = ("async", "bounded", "sync", "allreduce", "local")
STEPS = 20
POOL = 24
"""Number of different jobs of each engine. Few, so that the undisturbed run of each is computed once."""
BUSY_S = 14.0
"""Faults fall into the first so many virtual seconds; an undisturbed run takes about as long."""
START_TIMEOUT_S, STEP_TIMEOUT_S = 60.0, 25.0


@dataclass(frozen=True)
class Request:
    """What a user asks of the running job."""

    at_s: float
    kind: Literal["interrupt", "attach", "remove"]
    task: str = ""


@dataclass(frozen=True)
class StoreFault:
    """What happens to one checkpoint while it is written."""

    number: int
    """Counts the checkpoints that the run writes, from 0."""
    kind: Literal["fails", "killed before", "killed in the middle", "killed after"]
    """`fails`: the filesystem raises an error. The others: the driver is killed before, while or after the file is
    written; "in the middle" leaves half of the file under its name, as some filesystems do."""


@dataclass(frozen=True)
class Schedule:
    """One simulated run."""

    seed: int
    engine: str
    job: ToyConfig
    behaviour: Behaviour
    nodes: tuple[float, ...]
    """CPUs of each node at the start. The driver is on the first one, which is never lost."""
    timing: Timing = field(default_factory=Timing)
    faults: tuple[ClusterFault, ...] = ()
    requests: tuple[Request, ...] = ()
    store_faults: tuple[StoreFault, ...] = ()
    write_s: float = 0.02
    """Virtual seconds before, and again after, a checkpoint is written; the driver does nothing else meanwhile."""

    @property
    def disturbances(self) -> int:
        return len(self.faults) + len(self.requests) + len(self.store_faults) + len(self.step_faults)

    @property
    def step_faults(self) -> dict[str, StepFault]:
        """Faults of workers that are not part of the job itself."""
        return {at: fault for at, fault in self.behaviour.faults.items() if fault.kind in ("raise", "slow", "hang")}

    def without(self, number: int) -> "Schedule":
        """Return the schedule without one of its disturbances, counted from 0."""
        for name in ("faults", "requests", "store_faults"):
            entries = getattr(self, name)
            if number < len(entries):
                return replace(self, **{name: entries[:number] + entries[number + 1 :]})
            number -= len(entries)
        gone = list(self.step_faults)[number]
        faults = {at: fault for at, fault in self.behaviour.faults.items() if at != gone}
        return replace(self, behaviour=replace(self.behaviour, faults=faults))

    def lines(self) -> list[str]:
        """Describe the schedule."""
        job = self.job
        tasks = ", ".join(
            f"{task.name} ({task.workers} workers, at least {task.min_workers or task.workers}, shares "
            f"{'+'.join(task.shares)}{'' if task.private else ', no private part'})"
            for task in job.tasks
        )
        return [
            f"seed {self.seed}, engine {dict(job.engine)}",
            f"tasks: {tasks}",
            f"optimizer {dict(job.optimizer)}, evaluations every {job.evaluate_every} rounds, checkpoints "
            f"{dict(job.checkpoints)}, resources {dict(job.resources)}",
            f"nodes with {', '.join(f'{cpus:g}' for cpus in self.nodes)} CPUs; {self.timing}",
            *(f"fault: {fault}" for fault in self.faults),
            *(f"request: {request}" for request in self.requests),
            f"a checkpoint takes {2 * self.write_s:g} s",
            *(f"checkpoint: {fault}" for fault in self.store_faults),
            *(f"worker {at}: {fault}" for at, fault in self.behaviour.faults.items()),
        ]


def make_schedule(seed: int, engine: str) -> Schedule:
    """Return the schedule of a seed."""
    chance = random.Random(f"{engine} {seed}")
    number = chance.randrange(POOL)
    job, behaviour = make_job(engine, number)
    nodes = _nodes(chance, job)
    timing = Timing(
        slow_share=chance.choice([0.0, 0.0, 0.01, 0.05]),
        slow_s=chance.choice([0.5, 2.0, 6.0]),
        detect_s=chance.choice([0.05, 0.5, 3.0]),
        start_s=chance.choice([0.5, 2.0, 2.0, 2.0, 26.0]),
    )
    behaviour = replace(
        behaviour,
        seed=seed,
        slowest_evaluation_s=chance.choice([1.0, 2.0, 8.0]),
        speeds={name: chance.choice([0.5, 1.0, 1.0, 3.0]) for name in workers_of(job)},
        faults={**behaviour.faults, **_step_faults(chance, job)},
    )
    if engine == "local":
        faults: tuple[ClusterFault, ...] = _driver_faults(chance)
    else:
        faults = _faults(chance, job, nodes)
    return Schedule(
        seed=seed,
        engine=engine,
        job=job,
        behaviour=behaviour,
        nodes=nodes,
        timing=timing,
        faults=faults,
        requests=_requests(chance, job),
        store_faults=_store_faults(chance),
        write_s=chance.choice([0.02, 0.02, 0.5, 2.0]),
    )


def workers_of(job: ToyConfig) -> list[str]:
    return [f"{task.name}/{rank}" for task in job.tasks for rank in range(task.workers)]


def make_job(engine: str, number: int) -> tuple[ToyConfig, Behaviour]:
    """Return a job of an engine's pool, and its steps whose gradients are not finite."""
    chance = random.Random(f"job {engine} {number}")
    settings = _engine(chance, engine)
    rounds = settings["name"] in ("sync", "allreduce") or settings.get("schedule") == "rounds"
    together = rounds or settings.get("staleness") == 0
    tasks = _tasks(chance, guests=engine in ("async", "bounded", "sync"))
    falling = {"name": "exponential", "factor": 0.5, "every_rounds": chance.choice([4, 7])}
    job = ToyConfig(
        tasks=tasks,
        later=(ToyTask(name="late", shares=("body",)),),
        engine=settings,
        optimizer={"name": "sgd", "rate": chance.choice([1.0, 0.5]), "momentum": chance.choice([0.0, 0.5])},
        # Only where a run can be compared with another one: the formulas ask for one rate.
        schedule=chance.choice([{"name": "constant"}, falling]) if together else {"name": "constant"},
        steps=STEPS,
        evaluate_every=chance.choice([3, 5, 8]),
        checkpoints={"keep": chance.choice([1, 2, 3]), **chance.choice([{"every_rounds": 3}, {"every_rounds": 6}, {}])},
        resources={
            "start_timeout_s": START_TIMEOUT_S,
            "step_timeout_s": STEP_TIMEOUT_S,
            "cpus_per_worker": 1.0,
            "placement": chance.choice([None, None, "spread", "pack"]),
        },
        train_shared=chance.random() < 0.9,
    )
    spoiled: dict[str, StepFault] = {}
    if chance.random() < 0.4:
        for _ in range(chance.randint(1, 3)):
            worker = chance.choice(workers_of(job))
            kind: Any = chance.choice(["nan-shared", "nan-private"])
            spoiled[step_of(worker, chance.randrange(STEPS))] = StepFault(kind)
    return job, Behaviour(faults=spoiled)


def _engine(chance: random.Random, engine: str) -> dict[str, Any]:
    match engine:
        case "async":
            return {"name": engine, "shards": chance.choice([1, 2, 3]), "in_flight": chance.choice([0, 1])}
        case "bounded":
            staleness = chance.choice([0, 1, 2, 3])
            in_flight = chance.choice([0, 1]) if staleness > 1 else 0
            return {"name": engine, "shards": chance.choice([1, 2]), "staleness": staleness, "in_flight": in_flight}
        case "sync":
            return {"name": engine, "shards": chance.choice([1, 2])}
        case "local":
            return {"name": engine, **chance.choice([{"schedule": "rounds"}, {"schedule": "turns"}, {"delay": 2}])}
        case _:
            return {"name": engine}


def _tasks(chance: random.Random, guests: bool) -> tuple[ToyTask, ...]:
    """Return two or three tasks with three to five workers together."""
    numbers = chance.choice([(1, 1, 1), (1, 2), (2, 1), (1, 2, 1), (2, 2), (3, 1), (1, 1, 2)])
    shares = chance.choice([(("body",),) * 3, (("body", "ab"), ("body", "ab"), ("body",))])
    data = chance.choice(["", "", "the same rows"])
    tasks = []
    for name, workers, parts in zip("abc", numbers, shares, strict=False):
        fewer = guests and workers > 1 and chance.random() < 0.6
        tasks.append(
            ToyTask(
                name=name,
                workers=workers,
                min_workers=1 if fewer else None,
                shares=parts,
                private=chance.random() < 0.85,
                weight=chance.choice([1.0, 1.0, 2.0]),
                rows=1 if data else chance.choice([1, 1, 3]),
                skips=not data and chance.random() < 0.3,
                data=data,
            )
        )
    return tuple(tasks)


def _nodes(chance: random.Random, job: ToyConfig) -> tuple[float, ...]:
    """Return nodes that hold all workers, or only those that each task needs from the start."""
    wanted = sum(task.workers for task in job.tasks)
    needed = sum(task.min_workers or task.workers for task in job.tasks)
    cpus = chance.choice([wanted, wanted + 2, needed])
    number = chance.choice([1, 2, 3])
    shares = (float(cpus // number + (rank < cpus % number)) for rank in range(number))
    return tuple(share for share in shares if share)


CALLS = {
    "server": (
        *("push", "push", "push", "join", "pull", "drain", "ping", "snapshot", "snapshot"),
        *("call finish", "call finish", "call report_state", "call report_evaluation", "call silent_workers"),
    ),
    "shard 1": ("stash", "stash", "follow", "read", "snapshot", "begin"),
    "ledger": (
        "push",
        "push",
        "push",
        "join",
        "pull",
        "report",
        "rest",
        "report_state",
        "finish",
        "begin_group",
        "job",
    ),
}
"""Actor -> its methods, of which some are listed more often. `call NAME` is the method `call` with this name."""


def _faults(chance: random.Random, job: ToyConfig, nodes: tuple[float, ...]) -> tuple[ClusterFault, ...]:
    """Return up to five faults of the cluster."""
    workers = workers_of(job)
    if job.engine["name"] == "allreduce":
        single = [f"rank {rank}" for rank in range(len(workers))]
        targets = [*single, "ledger", "ledger", "train", "train controller"]
        called = ["ledger"]
    else:
        shards = [f"shard {number}" for number in range(1, job.engine.get("shards", 1))]
        single = [f"worker {name}" for name in workers]
        targets = [*single, "server", "server", *shards]
        called = ["server", "server", *shards[:1]]
    faults: list[ClusterFault] = []
    for _ in range(chance.choice([0, 1, 2, 3, 4, 6])):
        at_s, target = chance.uniform(0.0, BUSY_S), chance.choice(targets)
        kinds = {"kill": 8, "memory": 1, "hang": 2, "call": 8, "late": 1, "driver": 2, "node": 2, "pause": 1}
        match chance.choices(list(kinds), list(kinds.values()))[0]:
            case "kill":
                faults.append(ClusterFault(kind=Kind.KILL, target=target, at_s=at_s))
            case "memory":
                faults.append(ClusterFault(kind=Kind.OUT_OF_MEMORY, target=target, at_s=at_s))
            case "hang":
                target = chance.choice([target, target, "driver"])
                faults.append(_hang(chance, target, at_s, for_ever=target in single))
            case "call":
                faults.append(_call_fault(chance, chance.choice(called)))
            case "late" if "shard 1" in called:
                faults += _late_push(chance)
            case "driver":
                faults.append(ClusterFault(kind=Kind.KILL, target="driver", at_s=at_s))
            case ("node" | "pause") as kind if len(nodes) > 1:
                number = chance.randrange(1, len(nodes))
                faults += _node_faults(chance, kind, at_s, number, nodes[number])
    if chance.random() < 0.1:
        faults.append(ClusterFault(kind=Kind.ADD_NODE, at_s=chance.uniform(0.0, BUSY_S), resources=_resources(2.0)))
    return tuple(faults)


def _hang(chance: random.Random, target: str, at_s: float, for_ever: bool) -> ClusterFault:
    """Return a fault that lets a process do nothing; a server hangs for less than anybody waits for it."""
    seconds = chance.choice([2.0, 10.0, inf]) if for_ever else chance.uniform(0.5, 10.0)
    return ClusterFault(kind=Kind.HANG, target=target, at_s=at_s, seconds=seconds)


def _call_fault(chance: random.Random, target: str) -> ClusterFault:
    method = chance.choice(CALLS[target])
    often = method in ("push", "stash", "follow", "drain", "ping", "call silent_workers", "read", "report")
    number = chance.randint(1, 60 if often else 4)
    kind = chance.choice([Kind.KILL, Kind.KILL, Kind.LOSE_ANSWER, Kind.LOSE_ANSWER, Kind.LOSE_CALL, Kind.DELAY_CALL])
    return ClusterFault(kind=kind, target=target, method=method, number=number, seconds=chance.uniform(0.1, 8.0))


def _late_push(chance: random.Random) -> list[ClusterFault]:
    """Return a push that waits for a shard while the server is lost, and reaches the restored server."""
    number = chance.randint(1, 50)
    delay = ClusterFault(
        kind=Kind.DELAY_CALL, target="shard 1", method="stash", number=number, seconds=chance.uniform(3.0, 12.0)
    )
    kill = ClusterFault(kind=Kind.KILL, target="server", method="push", number=number + chance.randint(1, 4))
    return [delay, kill]


def _node_faults(chance: random.Random, kind: str, at_s: float, number: int, cpus: float) -> list[ClusterFault]:
    """Return the loss of a node, and another one that comes in its place, or a node that cannot be reached."""
    name = f"node {number}"
    if kind == "pause":
        return [ClusterFault(kind=Kind.PAUSE_NODE, target=name, at_s=at_s, seconds=chance.uniform(0.5, 10.0))]
    later_s = at_s + chance.uniform(0.5, 20.0)
    return [
        ClusterFault(kind=Kind.KILL_NODE, target=name, at_s=at_s),
        ClusterFault(kind=Kind.ADD_NODE, at_s=later_s, resources=_resources(cpus)),
    ]


def _resources(cpus: float) -> dict[str, float]:
    return {"CPU": cpus, "memory": 2.0**34}


def _driver_faults(chance: random.Random) -> tuple[ClusterFault, ...]:
    """Return the faults of engine `local`, whose only process is the driver."""
    times = (chance.uniform(0.0, BUSY_S) for _ in range(chance.choice([0, 1, 2])))
    return tuple(ClusterFault(kind=Kind.KILL, target="driver", at_s=at_s) for at_s in times)


def _step_faults(chance: random.Random, job: ToyConfig) -> Mapping[str, StepFault]:
    found: dict[str, StepFault] = {}
    for kind, share in (("slow", 0.15), ("hang", 0.05), ("raise", 0.03)):
        if chance.random() < share and not (kind == "hang" and job.engine["name"] == "local"):
            at = step_of(chance.choice(workers_of(job)), chance.randrange(STEPS))
            found[at] = StepFault(kind, seconds=chance.uniform(1.0, 10.0))  # type: ignore[arg-type]
    return found


def _requests(chance: random.Random, job: ToyConfig) -> tuple[Request, ...]:
    requests = [
        Request(chance.uniform(0.0, BUSY_S), kind)
        for kind, share in (("interrupt", 0.12), ("attach", 0.06), ("remove", 0.05))
        if chance.random() < share
    ]
    named = {"interrupt": "", "attach": "late", "remove": job.tasks[0].name}
    return tuple(replace(request, task=named[request.kind]) for request in requests)


def _store_faults(chance: random.Random) -> tuple[StoreFault, ...]:
    if chance.random() > 0.15:
        return ()
    kind: Any = chance.choice(["fails", "killed before", "killed in the middle", "killed after"])
    return (StoreFault(chance.randrange(4), kind),)
