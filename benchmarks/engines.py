"""What does it cost that gradients meet? Every engine against two workers that share nothing, beside torch's
DistributedDataParallel and the parameter server of Ray's documentation.

Two workers with one thread each train one network (MobileNetV2 at 96 px or ResNet-50 at 64 px) on generated images,
with batch 32 and SGD with momentum. In every row that shares, all tensors of the network are shared by both workers
(one task with two workers, method `full`), and all rows read the same table in the same way, so that only the way in
which gradients meet differs. The base is this project's own worker. A plain loop that shares nothing shows what this
worker costs by itself. A row and the base take short turns, so that a ratio compares measurements that are close in
time. With `--device cuda` the workers compute on the GPU; if there is only one, they share it.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray
import torch
from torch import distributed

from benchmarks._common import Goal, at_least, environment, finish, make_parser
from benchmarks._pictures import noise_png
from benchmarks._rivals import DDP, Documented, Plain
from benchmarks._turns import LAPS, TIMEOUT_S, WARM_UP, Mark, Turns, Variant, outside_load, take_turns
from multitask.cluster.collectives import TorchCollectives
from multitask.cluster.ray_cluster import RayCluster
from multitask.cluster.session import ray_session
from multitask.data import write_table
from multitask.engines.ledger import LedgerActor
from multitask.engines.rank_server import LedgerConnection, RankServer
from multitask.engines.ranks import join, make_reduction, sharing_ranks
from multitask.engines.server_actors import ServerActor
from multitask.engines.workers import WorkerActor
from multitask.job.checkpoint import CheckpointStore
from multitask.job.job import Job
from multitask.server.messages import Gradients, GroupValues, Push, Reply, SnapshotRequest
from multitask.spec.reading import load_spec
from multitask.spec.schema import JobSpec
from multitask.worker import Server, Values, train_steps

BASE, OVERLAPPED, SYNC, ALLREDUCE = "nothing shared", "async in_flight 1", "sync", "allreduce"
DOCUMENTED = {"Ray's docs, async": False, "Ray's docs, sync": True}
RESOLUTIONS = {"mobilenet_v2": 96, "resnet50": 64, "resnet18": 64}
STEPS = {"cpu": 3, "cuda": 50}
GOALS = {OVERLAPPED: (0.93, 0.97), SYNC: (0.90, 0.95), ALLREDUCE: (0.90, 0.95)}
"""Row -> the ratio to the base that was promised at least, and the ambitious one."""
RESOLVED = 0.04
"""Ratios that differ by less count as equal: smaller differences did not repeat on the machine of the design."""
WORKERS, BATCH, ROWS, CLASSES = 2, 32, 512, 10


@dataclass(frozen=True)
class Setting:
    """What is the same in all rows."""

    model: str
    gpus_per_worker: float
    folder: Path
    """The folder of the table."""

    @property
    def checkpoints(self) -> CheckpointStore:
        """Return a store that stays empty."""
        return CheckpointStore(str(self.folder / "checkpoints"), keep=1)

    def spec(self, *, shared: bool, engine: Mapping[str, Any]) -> JobSpec:
        """Return a job of one task with two workers, or of two tasks that share nothing with one worker each."""
        tasks = [{"name": "both", "workers": WORKERS}] if shared else [{"name": "one"}, {"name": "two"}]
        return load_spec(
            {
                "name": "engines",
                "backbone": {"name": self.model},
                "task_defaults": {
                    "data": str(self.folder),
                    "method": "full",
                    "resolution": RESOLUTIONS[self.model],
                    "batch_size": BATCH,
                },
                "tasks": tasks,
                "train_shared": True,
                "steps": 1_000_000,
                "evaluate_every": 1_000_000,
                "optimizer": {"name": "sgd", "rate": 0.001, "momentum": 0.9},
                "engine": engine,
                "checkpoints": {"every_minutes": None},
                "resources": {"gpus_per_worker": self.gpus_per_worker},
            }
        )


def make_rows(setting: Setting) -> dict[str, Callable[[], Variant]]:
    """Return row -> the function that starts its processes. A new engine needs a line here and one in GOALS."""

    def engine(shared: bool = True, **options: Any) -> Callable[[], Variant]:
        return lambda: ServerEngine(Job(setting.spec(shared=shared, engine=options)))

    job = Job(setting.spec(shared=True, engine={"name": "async"}))
    allreduce = Job(setting.spec(shared=True, engine={"name": "allreduce"}))
    backend, ddp = ddp_backend(setting)
    return {
        BASE: engine(shared=False, name="async", in_flight=0),
        OVERLAPPED: engine(name="async", in_flight=1),
        SYNC: engine(name="sync"),
        ALLREDUCE: partial(AllreduceEngine, allreduce, setting.checkpoints, backend, setting.folder / "engine"),
        "plain torch loop": partial(Plain, job),
        ddp: partial(DDP, job, backend, setting.folder / "ranks"),
        **{name: partial(Documented, job, synchronous=synchronous) for name, synchronous in DOCUMENTED.items()},
    }


def ddp_backend(setting: Setting) -> tuple[str, str]:
    """Return the backend of DDP's ranks, and the name of its row."""
    if setting.gpus_per_worker == 1:
        return "nccl", "torch DDP, nccl"
    if setting.gpus_per_worker:
        return "gloo", "torch DDP, gloo (NCCL cannot put two ranks on one GPU)"
    return "gloo", "torch DDP, gloo"


class BlockedTime:
    """A worker's server that also counts the seconds for which pushes and replies keep the worker waiting."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.seconds = 0.0

    def pull(self, worker: str) -> tuple[Reply, Values]:
        return self._server.pull(worker)

    def push(self, push: Push, gradients: Gradients) -> Any:
        start = time.perf_counter()
        handle = self._server.push(push, gradients)
        self.seconds += time.perf_counter() - start
        return handle

    def wait(self, handle: Any) -> tuple[Reply, Values]:
        start = time.perf_counter()
        answer = self._server.wait(handle)
        self.seconds += time.perf_counter() - start
        return answer

    def snapshot(self, version: int, worker: str) -> Values | None:
        return self._server.snapshot(version, worker)

    def snapshot_requests(self, worker: str) -> tuple[SnapshotRequest, ...]:
        return self._server.snapshot_requests(worker)

    def report_state(
        self, request: SnapshotRequest, worker: str, step: int, position: int, private: dict[str, GroupValues]
    ) -> None:
        self._server.report_state(request, worker, step, position, private)

    def report_evaluation(
        self, request: SnapshotRequest, task: str, metrics: dict[str, float], private: dict[str, GroupValues]
    ) -> None:
        self._server.report_evaluation(request, task, metrics, private)

    def report_alive(self, worker: str) -> None:
        self._server.report_alive(worker)

    def finish(self, worker: str, step: int) -> None:
        self._server.finish(worker, step)


def run_steps(loop: Iterator[None], clock: BlockedTime, steps: int) -> list[Mark]:
    marks = []
    for _ in range(steps):
        next(loop)
        marks.append(Mark(time.perf_counter(), clock.seconds))
    return marks


class TimedWorker(WorkerActor):
    """The engine's worker actor, which makes a few steps at a time."""

    def prepare(self, decoder: Any = None) -> None:
        super().prepare(decoder)
        self._clock = BlockedTime(self._server)
        self._loop: Iterator[None] = train_steps(self.worker, self._clock, self._job.steps, self._in_flight)

    def run(self, steps: int) -> list[Mark]:
        return run_steps(self._loop, self._clock, steps)


class ServerEngine:
    """The actors of an engine with a parameter server."""

    def __init__(self, job: Job) -> None:
        shared_job = ray.put(job)
        server: Any = ray.remote(ServerActor).options(num_cpus=0).remote(RayCluster())
        ray.get(server.begin.remote(shared_job), timeout=TIMEOUT_S)
        actor: Any = ray.remote(TimedWorker).options(num_cpus=0, num_gpus=job.spec.resources.gpus_per_worker)
        self._workers = [actor.remote(RayCluster(), shared_job, name, 0, server) for name in job.workers]
        self.actors: list[Any] = [server, *self._workers]
        ray.get([worker.prepare.remote() for worker in self._workers], timeout=TIMEOUT_S)

    def turn(self, steps: int) -> list[list[Mark]]:
        return ray.get([worker.run.remote(steps) for worker in self._workers], timeout=TIMEOUT_S)


class TimedRank:
    """A rank of engine `allreduce` that makes a few steps at a time and is started without Ray Train."""

    def __init__(self, job: Job, number: int, backend: str, meeting: Path) -> None:
        torch.set_num_threads(job.spec.resources.threads_per_worker)
        distributed.init_process_group(
            backend, init_method=f"file://{meeting}", rank=number, world_size=len(job.workers)
        )
        self._job, self._name = job, list(job.workers)[number]

    def prepare(self, ledger: LedgerConnection) -> None:
        job, name = self._job, self._name
        worker = job.make_worker(name, job.make_batches(name))
        ranks = TorchCollectives()
        reduction = make_reduction(job, worker, sharing_ranks(job, name, ranks), ranks.sums_on)
        _, operations = join(ledger, name)
        steps_left = dict.fromkeys(job.workers, job.steps)
        server = RankServer(job, worker, ledger, reduction, steps_left, operations)
        self._clock = BlockedTime(server)
        self._loop: Iterator[None] = train_steps(worker, self._clock, job.steps, 0)

    def run(self, steps: int) -> list[Mark]:
        return run_steps(self._loop, self._clock, steps)


class AllreduceEngine:
    """The ledger and the ranks of engine `allreduce`."""

    def __init__(self, job: Job, store: CheckpointStore, backend: str, meeting: Path) -> None:
        meeting.unlink(missing_ok=True)
        shared_job = ray.put(job)
        ledger: Any = ray.remote(LedgerActor).options(num_cpus=0).remote(RayCluster())
        ray.get(ledger.begin.remote(shared_job, store), timeout=TIMEOUT_S)
        actor: Any = ray.remote(TimedRank).options(num_cpus=0, num_gpus=job.spec.resources.gpus_per_worker)
        self._ranks = [actor.remote(shared_job, number, backend, meeting) for number in range(len(job.workers))]
        self.actors: list[Any] = [ledger, *self._ranks]
        connection = LedgerConnection(RayCluster(), ledger, ray.get(ledger.begin_group.remote(), timeout=TIMEOUT_S))
        ray.get([rank.prepare.remote(connection) for rank in self._ranks], timeout=TIMEOUT_S)

    def turn(self, steps: int) -> list[list[Mark]]:
        return ray.get([rank.run.remote(steps) for rank in self._ranks], timeout=TIMEOUT_S)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=RESOLUTIONS, default="mobilenet_v2")
    parser.add_argument("--device", choices=STEPS, default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="comparisons of every row with the base")
    parser.add_argument(
        "--steps", type=int, help="measured steps of each worker in each turn; by default " + str(STEPS).strip("{}")
    )
    parser.add_argument("--rows", nargs="+", choices=GOALS, help="compare nothing but these with the base")
    arguments = parser.parse_args()
    steps = arguments.steps or STEPS[arguments.device]
    gpus = gpus_per_worker(arguments.device)
    around = environment() | gpu_environment(arguments.device)
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - actors would run at nice 15, other processes at 0
    with tempfile.TemporaryDirectory() as name, ray_session():
        setting = Setting(arguments.model, gpus, Path(name))
        write_tables(setting.folder)
        rows = make_rows(setting)
        if arguments.rows:
            rows = {name: rows[name] for name in (BASE, *arguments.rows)}
        turns = take_turns(rows, BASE, rounds=arguments.rounds, steps=steps, images_per_step=BATCH)
    where = f"{arguments.model}, {RESOLUTIONS[arguments.model]} px, {arguments.device}"
    tables = {f"Two workers, {where}: medians over rounds": [summary(name, turns) for name in turns]}
    if rivals(turns):
        tables[f"Ratio of '{OVERLAPPED}' - ratio of another row"] = [lead(name, turns) for name in rivals(turns)]
    finish(
        arguments.out,
        tables=tables,
        environment=around,
        goals=make_goals(turns),
        settings={
            "model": arguments.model,
            "device": arguments.device,
            "resolution": RESOLUTIONS[arguments.model],
            "batch": BATCH,
            "rounds": arguments.rounds,
            "steps": steps,
            "turns_in_a_round": LAPS,
            "warm_up_steps": WARM_UP,
            "outside_load_cores": outside_load(turns),
            "turns": turns,
        },
    )


def gpu_environment(device: str) -> dict[str, str]:
    return {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}


def gpus_per_worker(device: str) -> float:
    """Return one GPU for each worker, or an equal share if there is only one."""
    if device == "cpu":
        return 0.0
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here. Leave --device out to measure on the processor.")
    return min(1.0, torch.cuda.device_count() / WORKERS)


def ratios(name: str, turns: Turns) -> list[float]:
    """Return images/s divided by the base's, for each round."""
    return [turn["ratio"] for turn in turns[name]]


def rivals(turns: Turns) -> list[str]:
    return [name for name in turns if name.startswith("torch DDP") or name in DOCUMENTED]


def leads(name: str, turns: Turns) -> list[float]:
    """Return how much the ratio of `async` with one push in flight is above another row's, for each round."""
    pairs = zip(ratios(OVERLAPPED, turns), ratios(name, turns), strict=True)
    return [ratio - other for ratio, other in pairs]


def summary(name: str, turns: Turns) -> dict[str, Any]:
    columns = turns[BASE][0]
    return {
        "row": name,
        # Not every row can tell how long its workers are blocked.
        **{key: median(turn[key] for turn in turns[name]) if key in turns[name][0] else None for key in columns},
        "lowest": min(ratios(name, turns)),
        "highest": max(ratios(name, turns)),
    }


def lead(name: str, turns: Turns) -> dict[str, Any]:
    found = leads(name, turns)
    middle = median(found)
    verdict = f"equal within {RESOLVED}" if abs(middle) < RESOLVED else "above" if middle > 0 else "below"
    return {"other row": name, "difference": middle, "lowest": min(found), "highest": max(found), "async is": verdict}


def make_goals(turns: Turns) -> list[Goal]:
    goals = [
        at_least(f"{name}: images/s / images/s with {BASE}", median(ratios(name, turns)), goal, stretch)
        for name, (goal, stretch) in GOALS.items()
        if name in turns
    ]
    for name in rivals(turns):
        least = 0.05 if name in DOCUMENTED else -RESOLVED
        goals.append(at_least(f"{OVERLAPPED}: ratio - ratio of {name}", median(leads(name, turns)), least))
    return goals


def write_tables(folder: Path) -> None:
    """Write tables of small noisy pictures, which take a step little time to read."""
    random = np.random.default_rng(0)
    for split in ("train", "validation"):
        images = ((noise_png(random), row % CLASSES) for row in range(ROWS))
        write_table(folder / split, images, [f"class {label}" for label in range(CLASSES)])


if __name__ == "__main__":
    main()
