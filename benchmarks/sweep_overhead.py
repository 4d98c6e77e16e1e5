"""What does a trial of a sweep cost beyond its training?

The trials of a sweep are equal except for their seed, and run one at a time. A trial's time runs from the end of the
trial before it to its own end. Its training time is that of `multitask.train` with the same job in a process that has
trained once before. The rest is the cost of the sweep: Tune, a new process where none is used again, and MLflow's
nested runs. The tables have medians, without the first trial and the first training.
"""

import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

import multitask
from benchmarks._common import at_most, environment, finish, make_parser
from benchmarks._pictures import noise_png
from multitask.cluster.session import ray_session
from multitask.data import write_table
from multitask.engines import ENGINES
from multitask.run.live import read_status
from multitask.sweep import run_sweep

CLASSES, SIZE = 10, 16
OTHER_TRIALS = 3
"""Number of trials with engines that start processes for each trial (with allreduce most of a minute)."""


def main() -> None:
    parser = make_parser(__doc__)
    others = [name for name in ENGINES if name != "local"]
    parser.add_argument(
        "--others", nargs="*", choices=others, default=["async", "allreduce"], help="engines to measure beside local"
    )
    parser.add_argument(
        "--trials", type=int, default=6, help=f"of local's sweep, 2 or more; the others make at most {OTHER_TRIALS}"
    )
    parser.add_argument("--steps", type=int, default=50, help="of each training")
    arguments = parser.parse_args()
    if arguments.trials < 2:
        parser.error(f"--trials is {arguments.trials}; give 2 or more, because the first one is left out")
    if arguments.steps < 1:
        parser.error(f"--steps is {arguments.steps}; give 1 or more")
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - actors would run at nice 15, other processes at 0
    around = environment()
    with tempfile.TemporaryDirectory() as name, ray_session():
        folder = Path(name)
        write_images(folder / "data")
        rows = [measure(folder, "local", arguments.trials, arguments.steps)]
        for engine in arguments.others:
            rows.append(measure(folder, engine, min(OTHER_TRIALS, arguments.trials), arguments.steps))
    goals = [
        at_most(
            "local: seconds of a trial beyond its training, median of those after the first", rows[0]["overhead"], 3.0
        )
    ]
    settings = {key: value for key, value in vars(arguments).items() if key != "out"}
    finish(arguments.out, tables={"Seconds": rows}, environment=around, goals=goals, settings=settings)


def write_images(folder: Path) -> None:
    random = np.random.default_rng(0)
    for split, count in (("train", 2000), ("validation", 200)):
        images = ((noise_png(random, SIZE), number % CLASSES) for number in range(count))
        write_table(folder / split, images, [str(label) for label in range(CLASSES)])


def measure(folder: Path, engine: str, trials: int, steps: int) -> dict[str, Any]:
    task = {"name": "task", "data": str(folder / "data"), "method": "scale_bias+last_layer", "resolution": SIZE}
    job: dict[str, Any] = {
        "backbone": {"name": "mobilenet_v2", "num_classes": CLASSES, "options": {"width_mult": 0.25}},
        "tasks": [task | {"num_classes": CLASSES}],
        "train_shared": False,
        "steps": steps,
        "evaluate_every": steps,
        "optimizer": {"name": "adam", "rate": 1e-3},
        "engine": {"name": engine},
    }
    quiet = Console(quiet=True)
    alone = []
    for number in range(trials // 2 + 1):
        start = time.perf_counter()
        multitask.train({**job, "name": "alone", "directory": str(folder / f"{engine}_alone_{number}")}, console=quiet)
        alone.append(time.perf_counter() - start)
    start_s = time.time()
    result = run_sweep(
        {
            "name": "sweep",
            "job": job,
            "space": {"seed": {"grid": list(range(trials))}},
            "concurrent": 1,
            "retries": 0,  # two tries would count as one long trial
            "directory": str(folder / f"{engine}_sweep"),
        },
        console=quiet,
    )
    for outcome in result.outcomes:
        if outcome.state != "finished":
            trial = f"Trial {outcome.plan.number} of engine {engine}"
            raise SystemExit(f"{trial} ended as {outcome.state}, so there is nothing to measure: {outcome.error}")
    directories = [outcome.plan.directory for outcome in result.outcomes]
    ends = sorted((directory / "result.json").stat().st_mtime for directory in directories)
    later = [end - before for before, end in pairwise(ends)]
    training = median(alone[1:])
    return {
        "engine": engine,
        "trials": trials,
        "their processes": len({read_status(directory)["process"] for directory in directories}),
        "training": training,
        "first trial": ends[0] - start_s,
        "later trials": median(later),
        "overhead": median(later) - training,
        "most": max(later) - training,
    }


if __name__ == "__main__":
    main()
