"""What does the parameter server cost, against workers that share nothing?

Two worker actors train MobileNetV2 (3.5 million parameters) on generated images. Method `scale_bias` shares all but
2 % of the parameters through the server; method `full` shares nothing. All actors of all variants live at once and
one variant runs at a time, in turns, so that a ratio compares neighbours in time.
"""

import io
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray
from PIL import Image

from benchmarks._common import at_least, environment, finish, make_parser
from multitask.data import write_table
from multitask.engines.asynchronous import ServerActor, WorkerActor, ray_session
from multitask.job import Job
from multitask.server.messages import Push, Reply
from multitask.spec import JobSpec, load_spec
from multitask.worker import Server, train_steps

BASE = "nothing shared"
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {"method": "full", "in_flight": 0},
    "server, in_flight 0": {"method": "scale_bias", "in_flight": 0},
    "server, in_flight 1": {"method": "scale_bias", "in_flight": 1},
}
GOALS = {"server, in_flight 1": 0.95, "server, in_flight 0": 0.88}
WARM_UP = 3
"""Steps at the start of each turn that are left out."""
RESOLUTION, BATCH, ROWS, CLASSES = 96, 32, 256, 10


class BlockedTime:
    """A server as the worker sees it, with the seconds that pushes and their answers keep the worker waiting."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.seconds = 0.0

    def push(self, push: Push) -> Any:
        start = time.perf_counter()
        handle = self._server.push(push)
        self.seconds += time.perf_counter() - start
        return handle

    def wait(self, handle: Any) -> Reply:
        start = time.perf_counter()
        reply = self._server.wait(handle)
        self.seconds += time.perf_counter() - start
        return reply

    def call(self, method: str, *arguments: Any) -> Any:
        return self._server.call(method, *arguments)


class TimedWorker(WorkerActor):
    """The engine's worker actor, run a few steps at a time."""

    def prepare(self, decoder: Any) -> None:
        super().prepare(decoder)
        self._clock = BlockedTime(self._server)
        self._loop: Iterator[None] = train_steps(self._worker, self._clock, self._steps, self._in_flight)

    def run(self, steps: int) -> list[tuple[float, float]]:
        """For the start and for each step's end: the time, and the seconds blocked so far."""
        marks = [(time.perf_counter(), self._clock.seconds)]
        for _ in range(steps):
            next(self._loop)
            marks.append((time.perf_counter(), self._clock.seconds))
        return marks

    def processor_seconds(self) -> float:
        return time.process_time()


class TimedServer(ServerActor):
    def processor_seconds(self) -> float:
        return time.process_time()


class Variant:
    """The actors of one way to train."""

    def __init__(self, job: Job) -> None:
        shared_job = ray.put(job)
        self._server: Any = ray.remote(TimedServer).options(num_cpus=0).remote(shared_job)
        actor: Any = ray.remote(TimedWorker).options(num_cpus=0)
        self._workers = [actor.remote(shared_job, name, self._server) for name in job.workers]
        ray.get([worker.prepare.remote(None) for worker in self._workers], timeout=300)

    def turn(self, steps: int) -> dict[str, float]:
        """Run all workers for some steps; what the steps after the first few took."""
        self._run(WARM_UP)
        before = self._processor_seconds()
        marks = self._run(steps)
        spent = self._processor_seconds() - before
        spans = [(after[0] - before[0], after[1] - before[1]) for times in marks for before, after in pairwise(times)]
        return {
            "images/s": sum(BATCH * steps / (times[-1][0] - times[0][0]) for times in marks),
            "step ms": 1000 * median(wall for wall, _ in spans),
            "blocked ms": 1000 * median(blocked for _, blocked in spans),
            "processor ms": 1000 * spent / (steps * len(marks)),
        }

    def _run(self, steps: int) -> list[list[tuple[float, float]]]:
        return ray.get([worker.run.remote(steps) for worker in self._workers], timeout=600)

    def _processor_seconds(self) -> float:
        """Of workers and server together."""
        return sum(ray.get([actor.processor_seconds.remote() for actor in (self._server, *self._workers)]))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=6, help="turns of every variant")
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each worker in a turn")
    arguments = parser.parse_args()
    around = environment()
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - actors would run at nice 15, other processes at 0
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder, ray_session():
        write_tables(Path(folder))
        jobs = {name: Job(make_spec(Path(folder), **options)) for name, options in VARIANTS.items()}
        variants = {name: Variant(job) for name, job in jobs.items()}
        for repeat in range(arguments.repeats):
            # Another order in every repetition: a neighbour's load that comes and goes meets all variants alike.
            names = list(VARIANTS)
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                turns[name].append(variants[name].turn(arguments.steps))
    rows = [summary(name, jobs[name], turns) for name in VARIANTS]
    found = {row["variant"]: row["ratio"] for row in rows}
    finish(
        arguments.out,
        tables={"Two workers, medians over turns": rows},
        environment=around,
        goals=[at_least(f"{name}: images/s / images/s with {BASE}", found[name], goal) for name, goal in GOALS.items()],
        settings={
            "repeats": arguments.repeats,
            "steps": arguments.steps,
            "warm_up_steps": WARM_UP,
            "batch": BATCH,
            "resolution": RESOLUTION,
            "turns": turns,
        },
    )


def summary(name: str, job: Job, turns: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    ratios = [turn["images/s"] / base["images/s"] for turn, base in zip(turns[name], turns[BASE], strict=True)]
    pushed = sum(group.layout.pushed for group in job.groups.values() if group.on_server)
    return {
        "variant": name,
        "floats": pushed,
        **{key: median(turn[key] for turn in turns[name]) for key in turns[name][0]},
        "ratio": median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def make_spec(folder: Path, method: str, in_flight: int) -> JobSpec:
    return load_spec(
        {
            "name": "server_cost",
            "backbone": {"name": "mobilenet_v2"},
            "task_defaults": {"method": method, "resolution": RESOLUTION, "batch_size": BATCH},
            "tasks": [{"name": name, "data": str(folder / name)} for name in ("one", "two")],
            "train_shared": True,
            "steps": 1_000_000,
            "evaluate_every": 1_000_000,
            "optimizer": {"name": "sgd", "rate": 0.001, "momentum": 0.9},
            "engine": {"name": "async", "in_flight": in_flight},
        }
    )


def write_tables(folder: Path) -> None:
    """Small noisy pictures: reading them costs a step little, as with a table that is in memory."""
    random = np.random.default_rng(0)
    for task in ("one", "two"):
        for split in ("train", "validation"):
            images = ((noise(random), row % CLASSES) for row in range(ROWS))
            write_table(folder / task / split, images, [f"class {label}" for label in range(CLASSES)])


def noise(random: np.random.Generator) -> bytes:
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(file, "png")
    return file.getvalue()


if __name__ == "__main__":
    main()
