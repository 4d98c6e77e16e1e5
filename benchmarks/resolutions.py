"""What do private scales and biases give the resolutions of one data set? Fashion-MNIST at 10, 14, 20 and 28 px.

One small MobileNetV2 learns all four by turns in one process, three ways: each resolution owns its scales, biases and
running statistics and shares the rest, last layer included; all is shared; or all is private. The fair baseline stands
beside the second: its weights, with each resolution's running statistics measured anew on its own training images, so
that what it lacks is private γ and β alone. Top-1 on the test images, of the version that is best on validation images.

The first way's models then make a cascade, fitted on half of the validation images: what it answers on the test images
and costs in MACs, and its seconds beside those of the best single model, in turns, decoding left out.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import islice
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from rich.console import Console
from torch import Tensor

import multitask
import patches
from benchmarks._common import Goal, at_least, at_most, environment, finish, make_parser
from multitask.cascade import CascadeModel, View, check, fit
from multitask.cascade.from_run import cascade_from_run
from multitask.data import open_table
from multitask.data.transforms import decode
from multitask.evaluation import reestimate_statistics, torch_threads
from multitask.job import Job
from multitask.runs import Run, evaluate_models
from multitask.spec import load_spec

SPEC = Path(__file__).parents[1] / "jobs" / "specs" / "demo_resolutions.yaml"
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
BATCH, BATCHES, REPEATS = 256, 8, 7
"""Images at once, batches and repeats of the cascade's timing."""
SLACK = 0.0025
Answer = Callable[[list[Tensor]], object]


@dataclass(frozen=True)
class Measured:
    """One way with one seed."""

    mode: str
    seed: int
    top1: tuple[float, ...]
    """Of the test images in percent, from the lowest resolution to the highest."""
    parameters: int
    """Of all resolutions together, each shared one counted once."""
    seconds: float | None
    """Of training; none where nothing was trained."""


@dataclass(frozen=True)
class Cascaded:
    """A cascade over one run's resolutions, on the test images."""

    seed: int
    stages: str
    reference: str
    top1: float
    gain: float
    """Points of top-1 over the best single model."""
    saving: float
    """Percent of its MACs."""
    equal: str
    """The cheapest single model about as accurate as the cascade."""
    saving_against_equal: float
    ms: float
    """Of an image, resized from pixels."""
    reference_ms: float
    time_ratio: float
    """The cascade's time over the best single model's."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each resolution")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    arguments = parser.parse_args()
    around = environment()
    found: list[Measured] = []
    cascades: list[Cascaded] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            for mode in METHODS:
                run = train(Path(folder), mode, seed, arguments.steps)
                _, models = run.models("best")
                found.append(measure(run, mode, models, run.result["seconds"]))
                if mode == "private":
                    cascades.append(cascade(run))
                if mode == "shared":
                    found.append(measure(run, REESTIMATED, reestimated(run), None))
    by_mode = {mode: [measured for measured in found if measured.mode == mode] for mode in TITLES}
    finish(
        arguments.out,
        tables={
            f"Fashion-MNIST, test top-1, mean of {len(arguments.seeds)} seeds": [
                summary(mode, measured) for mode, measured in by_mode.items()
            ],
            "Cascades over private scales and biases, test images": [vars(cascaded) for cascaded in cascades],
            "Runs": [row(measured) for measured in found],
        },
        environment=around,
        goals=make_goals(by_mode, cascades),
        settings={"steps": arguments.steps, "seeds": arguments.seeds, "spec": SPEC.name, "timed_batch": BATCH},
    )


def train(folder: Path, mode: str, seed: int, steps: int) -> Run:
    """All resolutions in one way, as `multitask train` does it."""
    name = f"{mode}_{seed}"
    changes = {
        "name": name,
        "task_defaults": {"method": METHODS[mode]},
        "steps": steps,
        "evaluate_every": max(1, steps // 3),
        "seed": seed,
        "engine": {"name": "local"},
        "directory": str(folder / name),
    }
    return multitask.train(load_spec(SPEC, changes), console=Console(file=StringIO()))


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


def cascade(run: Run) -> Cascaded:
    """What a cascade over the run's tasks saves."""
    package = run.directory / "resolutions.cascade"
    fitted, test = cascade_from_run(run, package, slack=SLACK)
    checked = check(fitted, test)
    _, models = run.models("best")
    views = {task.name: View(task.resolution, task.mean, task.std) for task in run.spec.tasks}
    alone = CascadeModel(fit(test.only([fitted.reference]), fitted.costs), models, views)
    with torch_threads(run.spec.resources.threads_per_worker):
        seconds, reference_s = time_in_turns([CascadeModel.load(package), alone], batches(run))
    cascaded = Cascaded(
        seed=run.spec.seed,
        stages=" > ".join(f"{stage.model} {stage.share:.0%}" for stage in checked.stages),
        reference=fitted.reference,
        top1=100 * checked.accuracy.mean,
        gain=100 * checked.accuracy_gain.mean,
        saving=100 * checked.saving.mean,
        equal=checked.equal.model,
        saving_against_equal=100 * checked.saving_against_equal.mean,
        ms=1000 * median(seconds) / (BATCH * BATCHES),
        reference_ms=1000 * median(reference_s) / (BATCH * BATCHES),
        time_ratio=median(own / other for own, other in zip(seconds, reference_s, strict=True)),
    )
    print(f"cascade, seed {run.spec.seed}: {cascaded.gain:+.2f} points, {cascaded.saving:.1f} % saved", flush=True)
    return cascaded


def batches(run: Run) -> list[list[Tensor]]:
    """The first test images, decoded."""
    table = open_table(f"{run.spec.tasks[0].data}/test", verify=False)
    decoded = (decode(group.encoded(place)) for group in table.groups() for place in range(len(group)))
    images = list(islice(decoded, BATCH * BATCHES))
    return [images[start : start + BATCH] for start in range(0, len(images), BATCH)]


def time_in_turns(models: Sequence[Answer], images: Sequence[list[Tensor]]) -> list[list[float]]:
    """Seconds of each model for all batches, in every repeat but the first, which warms up."""
    taken: list[list[float]] = [[] for _ in models]
    for _ in range(REPEATS + 1):
        for seconds, model in zip(taken, models, strict=True):
            start = time.perf_counter()
            for batch in images:
                model(batch)
            seconds.append(time.perf_counter() - start)
    return [seconds[1:] for seconds in taken]


def summary(mode: str, measured: Sequence[Measured]) -> dict[str, Any]:
    averages = [mean(one.top1) for one in measured]
    seconds = [one.seconds for one in measured if one.seconds is not None]
    return {
        "way": TITLES[mode],
        **dict(zip((f"{size} px" for size in resolutions()), means(measured), strict=True)),
        "mean": mean(averages),
        "standard deviation": stdev(averages) if len(averages) > 1 else None,
        "parameters": measured[0].parameters,
        "seconds": mean(seconds) if seconds else None,
    }


def row(measured: Measured) -> dict[str, Any]:
    sizes = {f"{size} px": value for size, value in zip(resolutions(), measured.top1, strict=True)}
    return {"way": TITLES[measured.mode], "seed": measured.seed, **sizes, "seconds": measured.seconds}


def resolutions() -> list[int]:
    return [task.resolution for task in load_spec(SPEC).tasks]


def means(measured: Sequence[Measured]) -> list[float]:
    """Top-1 of each resolution, mean over the seeds."""
    return [mean(values) for values in zip(*(one.top1 for one in measured), strict=True)]


def make_goals(by_mode: Mapping[str, Sequence[Measured]], cascades: Sequence[Cascaded]) -> list[Goal]:
    private, shared, independent = (means(by_mode[mode]) for mode in ("private", "shared", "independent"))
    lowest = f"Private - all shared at {min(resolutions())} px, points of top-1"
    return [
        at_least(lowest, private[0] - shared[0], 2.0),
        at_least("Private - all shared, mean over the resolutions", mean(private) - mean(shared), 2.0),
        at_most("Independent - private, mean over the resolutions", mean(independent) - mean(private), 0.7),
        at_least(
            "Cascade: percent of the best single model's MACs saved", mean(one.saving for one in cascades), 15, 40
        ),
        at_least("Cascade - best single model, points of top-1", mean(one.gain for one in cascades), -0.3),
        at_most(
            f"Cascade: time of an image / the best single model's, batches of {BATCH}",
            median(one.time_ratio for one in cascades),
            1.0,
        ),
    ]


if __name__ == "__main__":
    main()
