"""Does a run end well whatever dies, and how soon is it back? Random kills of workers, servers, drivers and nodes.

A job of two tasks and three workers trains on a simulated Ray cluster (two nodes beside the head, all on this machine)
while its processes and nodes are killed at random moments. Every run has to end, and every step has to be applied once,
rejected, or counted as lost with the server. Under `sync` the run also has to end with the bits of an undisturbed run.
Linux only.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks._common import at_least, at_most, environment, finish, make_parser
from benchmarks._pictures import noise_png
from benchmarks._processes import own_actors
from multitask.data import write_table
from multitask.engines import ENGINES, Driver, Outcome
from multitask.job.checkpoint import CheckpointStore
from multitask.job.job import Job
from multitask.run.directory import write_spec
from multitask.run.live import read_status
from multitask.spec.reading import load_spec
from multitask.spec.schema import JobSpec

KINDS = ("worker", "server", "driver", "node")
STEPS_PER_KILL = 200
PATIENCE_S = 300.0
"""A run that makes no step for this time has not survived."""


@dataclass(frozen=True)
class Kill:
    kind: str
    recovery_s: float
    """Seconds from the kill until each lost worker has made a step in a new process, and the run goes on."""


@dataclass
class Disturbed:
    """The result of a run whose processes were killed again and again."""

    result: dict[str, Any]
    directory: Path
    kills: list[Kill] = field(default_factory=list)


def make_spec(folder: Path, directory: Path, engine: Mapping[str, Any], steps: int) -> JobSpec:
    return load_spec(
        {
            "name": "chaos",
            "backbone": {
                "name": "mobilenet_v2",
                "num_classes": 4,
                "options": {
                    "stem_stride": 1,
                    "inverted_residual_setting": [[1, 8, 1, 1], [2, 8, 2, 1], [2, 8, 1, 1]],
                    "last_channel": 16,
                },
            },
            "task_defaults": {
                "data": str(folder),
                "method": "scale_bias+last_layer",
                "num_classes": 4,
                "resolution": 12,
                "batch_size": 8,
            },
            # One task whose private tensors stay with its worker, one that has them on the server.
            "tasks": [{"name": "one"}, {"name": "two", "workers": 2}],
            "train_shared": True,
            "steps": steps,
            "evaluate_every": steps // 4,
            "optimizer": {"name": "adamw", "rate": 0.003},
            "schedule": {"name": "cosine"},
            "engine": dict(engine),
            "checkpoints": {"every_rounds": 20, "every_minutes": None},
            "resources": {"cpus_per_worker": 0.6},
            "directory": str(directory),
        }
    )


@contextlib.contextmanager
def cluster() -> Iterator[Any]:
    """Start a head and two nodes as processes on this machine, and end them with the block."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            nodes.add_node(num_cpus=2)
        yield nodes
    finally:
        nodes.shutdown()


class Chaos:
    """Run a job in a process of its own and kill its processes and nodes."""

    def __init__(self, nodes: Any, spec: JobSpec, seed: int) -> None:
        self._nodes = nodes
        self._directory = spec.run_directory
        self._random = random.Random(seed)
        self._spec_file = self._directory.with_suffix(".yaml")
        write_spec(self._spec_file, spec)
        self._log = self._directory.with_suffix(".log").open("wb")
        self._driver = self._start("train", str(self._spec_file))
        self.kills: list[Kill] = []

    def run(self, kinds: Sequence[str]) -> Disturbed:
        """Kill one thing of each of these kinds in turn, and wait for the run's end."""
        for kind in kinds:
            self._wait_for_steps(self._random.randint(10, STEPS_PER_KILL))
            if self._ended():
                break
            self.kills.append(Kill(kind, self._kill(kind)))
            back = f"{kind}, back after {self.kills[-1].recovery_s:.1f} s"
            print(f"{len(self.kills)} of {len(kinds)}: {back}", flush=True)
        self._wait(self._ended)
        if self._driver.returncode != 0:
            raise SystemExit(f"The run ended with {self._driver.returncode}. Its last words:\n{self._last_words()}")
        self._log.close()
        result = json.loads((self._directory / "result.json").read_text())
        return Disturbed(result, self._directory, self.kills)

    def _start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "jobs.cli", *arguments]
        around = {**os.environ, "RAY_ADDRESS": self._nodes.address}
        return subprocess.Popen(command, env=around, stdout=self._log, stderr=self._log, start_new_session=True)

    def _kill(self, kind: str) -> float:
        """Kill, and return the seconds until the run is back."""
        before = self._processes()
        start = time.time()
        if kind == "driver":
            os.killpg(self._driver.pid, signal.SIGKILL)
            self._driver.wait()
            self._driver = self._start("resume", str(self._directory))
        elif kind == "node":
            node = self._random.choice(self._nodes.list_all_nodes()[1:])
            self._nodes.remove_node(node, allow_graceful=False)
            self._nodes.add_node(num_cpus=2)
        else:
            actor = {"worker": "WorkerActor", "server": "ServerActor"}[kind]
            # While the driver starts all processes again, there may be no process of this kind for a moment.
            self._wait(lambda: bool(own_actors(actor)) or self._ended())
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(self._random.choice(own_actors(actor)), signal.SIGKILL)
        self._wait(lambda: self._ended() or self._is_back(start, before))
        return time.time() - start

    def _is_back(self, killed_at: float, before: Mapping[str, int]) -> bool:
        """Return whether each lost process has a successor that makes steps, and the driver has recorded them."""
        status = self._status()
        if status is None or status["updated"] < killed_at + 1.0 or status["state"] != "running":
            return False
        now = self._processes()
        dead = [worker for worker, process in before.items() if not Path(f"/proc/{process}").exists()]
        return all(now.get(worker) != before[worker] for worker in dead) and bool(own_actors("ServerActor"))

    def _status(self) -> dict[str, Any] | None:
        return read_status(self._directory) if (self._directory / "status.json").is_file() else None

    def _processes(self) -> dict[str, int]:
        """Return worker -> the process that made its last step."""
        status = self._status()
        tasks = {} if status is None else status["tasks"]
        return {worker: process for task in tasks.values() for worker, process in task["processes"].items()}

    def _made(self) -> int:
        status = self._status()
        return 0 if status is None else sum(task["made"] + task["redone"] for task in status["tasks"].values())

    def _last_words(self) -> str:
        return Path(self._log.name).read_text(errors="replace")[-6000:]

    def _ended(self) -> bool:
        return self._driver.poll() is not None

    def _wait_for_steps(self, steps: int) -> None:
        wanted = self._made() + steps
        self._wait(lambda: self._made() >= wanted or self._ended())

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline, made = time.monotonic() + PATIENCE_S, self._made()
        while not condition():
            if self._made() > made:
                deadline, made = time.monotonic() + PATIENCE_S, self._made()
            if time.monotonic() > deadline:
                raise SystemExit(f"No step was made for {PATIENCE_S:g} s. Its last words:\n{self._last_words()}")
            time.sleep(0.1)


def steps_unaccounted_for(spec: JobSpec, result: Mapping[str, Any]) -> int:
    """Return the steps that were not applied once, rejected or counted as lost; below 0 if some were applied twice."""
    workers = sum(task.workers for task in spec.tasks)
    together = spec.engine.together
    made = spec.steps * (1 if together else workers)
    known = sum(task["lost_pushes"] + task["rejected_pushes"] for task in result["tasks"].values())
    return made - int(result["last"]["version"]) - known


def updates_uncounted(spec: JobSpec) -> float:
    """Return how far a shared tensor's optimiser is from the server's count of updates, in the last checkpoint.

    The server counts what it decides, an optimiser what it does. They differ if a push was lost or applied twice.
    """
    checkpoint = CheckpointStore(spec.checkpoint_folder, 1).latest()
    assert checkpoint is not None
    return max(abs(count - checkpoint.progress.version) for count in checkpoint.shared_steps().values())


def undisturbed(spec: JobSpec) -> tuple[Job, Outcome]:
    """Train the job as engine `local` does by rounds."""
    engine = {"name": "local", "schedule": "rounds"}
    job = Job(load_spec(spec, {"engine": engine, "directory": f"{spec.directory}-undisturbed"}))
    return job, ENGINES["local"](job, Driver(lambda *_: None, CheckpointStore(job.spec.checkpoint_folder, 1)))


def last_bytes(job: Job, outcome: Outcome) -> dict[str, bytes]:
    """Return tensor -> the bytes of its final values, as `final_bytes` finds them in a run's directory."""
    backbone, private = job.state(outcome.versions["last"].groups)
    named = {f"backbone/{name}": tensor for name, tensor in backbone.items()}
    named |= {f"tasks/{task}/{name}": t for task, tensors in private.items() for name, t in tensors.items()}
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in named.items()}


def final_bytes(directory: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    return {name: tensor.numpy().tobytes() for name, tensor in load_file(directory / "last.safetensors").items()}


def write_tables(folder: Path) -> None:
    pictures = np.random.default_rng(0)
    for split in ("train", "validation"):
        rows = ((noise_png(pictures, 12), row % 4) for row in range(96))
        write_table(folder / split, rows, [f"class {label}" for label in range(4)])


def disturb(folder: Path, engine: Mapping[str, Any], kinds: Sequence[str], seed: int) -> tuple[JobSpec, Disturbed]:
    """Train a job and kill something of each kind in turn."""
    if not (folder / "data").exists():
        write_tables(folder / "data")
    spec = make_spec(folder / "data", folder / f"run-{engine['name']}", engine, STEPS_PER_KILL * (len(kinds) + 1))
    with cluster() as nodes:
        return spec, Chaos(nodes, spec, seed).run(kinds)


def draw(kills: int, seed: int) -> list[str]:
    """Return the kinds to kill in a random order, each about equally often."""
    kinds = [KINDS[number % len(KINDS)] for number in range(kills)]
    random.Random(seed).shuffle(kinds)
    return kinds


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=50, help="for each engine")
    parser.add_argument("--engines", nargs="+", choices=("async", "bounded", "sync"), default=["async", "sync"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    around = environment()
    rows, goals, kills = [], [], {}
    with tempfile.TemporaryDirectory() as name:
        for engine in arguments.engines:
            options = {"name": engine, **({"staleness": 4} if engine == "bounded" else {})}
            spec, run = disturb(Path(name), options, draw(arguments.kills, arguments.seed), arguments.seed)
            rows += summaries(engine, run.kills)
            kills[engine] = [vars(kill) for kill in run.kills]
            goals.append(at_least(f"{engine}: kills survived", len(run.kills), arguments.kills))
            unaccounted = abs(steps_unaccounted_for(spec, run.result))
            goals.append(at_most(f"{engine}: steps applied twice, or neither applied nor counted", unaccounted, 0))
            goals.append(at_most(f"{engine}: updates made and not counted, or the reverse", updates_uncounted(spec), 0))
            if engine == "sync":
                expected, found = last_bytes(*undisturbed(spec)), final_bytes(run.directory)
                differing = sum(found.get(name) != values for name, values in expected.items())
                goals.append(at_most("sync: tensors that differ from an undisturbed run's", differing, 0))
    finish(
        arguments.out,
        tables={"Seconds from a kill until all work again": rows},
        environment=around,
        goals=goals,
        settings={"seed": arguments.seed, "kills": kills},
    )


def summaries(engine: str, kills: Sequence[Kill]) -> list[dict[str, Any]]:
    found = []
    for kind in KINDS:
        seconds = [kill.recovery_s for kill in kills if kill.kind == kind]
        if seconds:
            times = {"median s": median(seconds), "longest s": max(seconds)}
            found.append({"engine": engine, "killed": kind, "times": len(seconds), **times})
    return found


if __name__ == "__main__":
    main()
