"""What does a trial of a sweep cost beyond its training?

The trials of a sweep are equal and run one at a time. A trial's seconds are those from the end of the trial before it
to its own end; of them, the seconds of `multitask.train` with the same job in a process that has made one before are
the training, and the rest is what the sweep costs: Tune, a process where none is used again, and MLflow's nesting.
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
from multitask.data import write_table
from multitask.engines.served import ray_session
from multitask.sweep import run_sweep

CLASSES, SIZE = 10, 16


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--engines", nargs="+", default=["local", "async", "allreduce"])
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - actors would run at nice 15, other processes at 0
    around = environment()
    with tempfile.TemporaryDirectory() as name, ray_session():
        folder = Path(name)
        write_images(folder / "data")
        rows = [measure(folder, engine, arguments.trials, arguments.steps) for engine in arguments.engines]
    goals = [
        at_most(f"{row['engine']}: seconds of a trial beyond its training, after the first", row["overhead"], 3.0)
        for row in rows
        if row["engine"] == "local"
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
    for number in range(3):
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
            "directory": str(folder / f"{engine}_sweep"),
        },
        console=quiet,
    )
    ends = sorted((outcome.plan.directory / "result.json").stat().st_mtime for outcome in result.outcomes)
    training = median(alone[1:])
    later = median(end - before for before, end in pairwise(ends))
    return {
        "engine": engine,
        "training": training,
        "first trial": ends[0] - start_s,
        "later trials": later,
        "overhead": later - training,
    }


if __name__ == "__main__":
    main()
