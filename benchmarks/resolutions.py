"""What do private scales and biases give the resolutions of one data set? Fashion-MNIST at 10, 14, 20 and 28 px.

One small MobileNetV2 learns all four by turns in one process, three ways: each resolution owns its scales, biases and
running statistics and shares the rest, last layer included; all is shared; or all is private. The fair baseline stands
beside the second: its weights, with each resolution's running statistics measured anew on its own training images, so
that what it lacks is private γ and β alone. Top-1 on the test images, of the version that is best on validation images.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console

import multitask
import patches
from benchmarks._common import Goal, at_least, at_most, environment, finish, make_parser
from multitask.evaluation import reestimate_statistics, torch_threads
from multitask.job import Job
from multitask.runs import Run, evaluate_models
from multitask.spec import load_spec

FASHION = Path(__file__).parents[1] / "jobs" / "data" / "fashion"
RESOLUTIONS = (10, 14, 20, 28)
SEEDS = (0, 1, 2)
STEPS = 300
METHODS = {"private": "scale_bias", "shared": "shared", "independent": "full"}
REESTIMATED = "shared, statistics re-estimated"
REESTIMATION_BATCHES = 100
TITLES = {
    "private": "private scales and biases",
    "shared": "all shared",
    REESTIMATED: "all shared, statistics re-estimated",
    "independent": "independent models",
}
SPEC: dict[str, Any] = {
    "backbone": {
        "name": "mobilenet_v2",
        "num_classes": 10,
        "options": {
            "stem_stride": 1,
            "inverted_residual_setting": [[1, 8, 1, 1], [4, 16, 2, 2], [4, 24, 2, 2], [4, 40, 2, 2], [4, 64, 1, 1]],
            "last_channel": 256,
            "dropout": 0.0,
        },
    },
    "train_shared": True,
    "optimizer": {"name": "adamw", "rate": 0.003, "weight_decay": 0.0},
    "schedule": {"name": "cosine"},
    "engine": {"name": "local"},
    "checkpoints": {"every_minutes": None},
}
TASK = {
    "name": "fashion",
    "data": str(FASHION),
    "resolution": list(RESOLUTIONS),
    "batch_size": 64,
    "validation_images": 2000,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}


@dataclass(frozen=True)
class Measured:
    """One way with one seed."""

    mode: str
    seed: int
    top1: tuple[float, ...]
    """Of the test images in percent, in the order of RESOLUTIONS."""
    parameters: int
    """Of all resolutions together, each shared one counted once."""
    seconds: float | None
    """Of training; none where nothing was trained."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each resolution")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    arguments = parser.parse_args()
    around = environment()
    found: list[Measured] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            for mode in METHODS:
                run = train(Path(folder), mode, seed, arguments.steps)
                _, models = run.models("best")
                found.append(measure(run, mode, models, run.result["seconds"]))
                if mode == "shared":
                    found.append(measure(run, REESTIMATED, reestimated(run), None))
    by_mode = {mode: [measured for measured in found if measured.mode == mode] for mode in TITLES}
    finish(
        arguments.out,
        tables={
            f"Fashion-MNIST, test top-1, mean of {len(arguments.seeds)} seeds": [
                summary(mode, measured) for mode, measured in by_mode.items()
            ],
            "Runs": [row(measured) for measured in found],
        },
        environment=around,
        goals=make_goals(by_mode),
        settings={"steps": arguments.steps, "seeds": arguments.seeds, "spec": SPEC, "task": TASK | {"data": "fashion"}},
    )


def train(folder: Path, mode: str, seed: int, steps: int) -> Run:
    """All resolutions in one way, as `multitask train` does it."""
    name = f"{mode}_{seed}"
    spec = SPEC | {
        "name": name,
        "tasks": [TASK | {"method": METHODS[mode]}],
        "steps": steps,
        "evaluate_every": max(1, steps // 3),
        "seed": seed,
        "directory": str(folder / name),
    }
    return multitask.train(load_spec(spec), console=Console(file=StringIO()))


def reestimated(run: Run) -> dict[str, patches.PatchedModel]:
    """The shared network with each resolution's own running statistics, over its own training images."""
    backbone, _ = run.models("best")
    job = Job(run.spec)
    models = {}
    with torch_threads(run.spec.resources.threads_per_worker):
        for task in run.spec.tasks:
            models[task.name] = patches.attach(backbone, "norm_statistics")
            reestimate_statistics(models[task.name], islice(job.make_batches(f"{task.name}/0"), REESTIMATION_BATCHES))
    return models


def measure(run: Run, mode: str, models: Mapping[str, patches.PatchedModel], seconds: float | None) -> Measured:
    test = evaluate_models(models, run.spec, "test")
    top1 = tuple(test[task.name]["top1"] for task in run.spec.tasks)
    print(f"{TITLES[mode]}, seed {run.spec.seed}: {' '.join(f'{value:.2f}' for value in top1)}", flush=True)
    return Measured(mode, run.spec.seed, top1, run.result["parameters"], seconds)


def summary(mode: str, measured: Sequence[Measured]) -> dict[str, Any]:
    averages = [mean(one.top1) for one in measured]
    seconds = [one.seconds for one in measured if one.seconds is not None]
    return {
        "way": TITLES[mode],
        **dict(zip((f"{size} px" for size in RESOLUTIONS), means(measured), strict=True)),
        "mean": mean(averages),
        "standard deviation": stdev(averages) if len(averages) > 1 else None,
        "parameters": measured[0].parameters,
        "seconds": mean(seconds) if seconds else None,
    }


def row(measured: Measured) -> dict[str, Any]:
    sizes = {f"{size} px": value for size, value in zip(RESOLUTIONS, measured.top1, strict=True)}
    return {"way": TITLES[measured.mode], "seed": measured.seed, **sizes, "seconds": measured.seconds}


def means(measured: Sequence[Measured]) -> list[float]:
    """Top-1 of each resolution, mean over the seeds."""
    return [mean(values) for values in zip(*(one.top1 for one in measured), strict=True)]


def make_goals(by_mode: Mapping[str, Sequence[Measured]]) -> list[Goal]:
    private, shared, independent = (means(by_mode[mode]) for mode in ("private", "shared", "independent"))
    lowest = f"Private - all shared at {RESOLUTIONS[0]} px, points of top-1"
    return [
        at_least(lowest, private[0] - shared[0], 2.0),
        at_least("Private - all shared, mean over the resolutions", mean(private) - mean(shared), 2.0),
        at_most("Independent - private, mean over the resolutions", mean(independent) - mean(private), 0.7),
    ]


if __name__ == "__main__":
    main()
