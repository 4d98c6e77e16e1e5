"""What do private scales and biases give the resolutions of one data set? Fashion-MNIST at 10, 14, 20 and 28 px.

One small MobileNetV2 learns all four resolutions by turns in one process, in three ways: each resolution owns its
scales, biases and running statistics and shares the rest, including the last layer; everything is shared; or everything
is private. A fourth way is the fair baseline: everything is shared, and then each resolution's running statistics are
measured anew on its own training images, so that it lacks nothing but private γ and β. The rate of each way, also of
the fair baseline, is the best of a grid by validation top-1 with the first seed. As many runs train at a time as there
are cores. Top-1 is measured on test images, with the version that is best on validation images, or with the last
version where statistics are measured anew.

The models of the first way then make a cascade, which is fitted on half of the validation images. The benchmark
compares its test accuracy and its cost in MACs with two single models: the best one on that half, which is the
cascade's reference, and the cheapest one that is about as accurate on the test images. It also compares its seconds
with those of the reference, in turns and without decoding.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cache
from io import StringIO
from itertools import islice, product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from rich.console import Console
from torch import Tensor

import multitask
import patches
from benchmarks._common import Goal, at_least, at_most, environment, finish, make_parser
from multitask.cascade import Cascade, CascadeModel, OperatingPoint, Predictions, check
from multitask.cascade.from_run import cascade_from_run
from multitask.cascade.greedy import Stage
from multitask.cascade.rules import Rule
from multitask.data import open_table
from multitask.evaluation import evaluate, reestimate_statistics, torch_threads
from multitask.job.job import Job
from multitask.job.tables import open_split, preprocessing, table_batches
from multitask.run.directory import Run, evaluate_models
from multitask.spec.reading import load_spec
from patches.images.decoding import decode

SPEC = Path(__file__).parents[1] / "jobs" / "specs" / "demo_resolutions.yaml"
SEEDS = (0, 1, 2)
RATES = (0.003, 0.006, 0.012)
"""One of the rates is the demo's."""
REESTIMATION_BATCHES = 100
BATCH, BATCHES, REPEATS = 256, 8, 7
"""Images in a batch, number of batches, and number of repeats for timing the cascade."""
SLACK = 0.0025
"""The default of `multitask cascade fit`."""
Answer = Callable[[list[Tensor]], object]


@dataclass(frozen=True)
class Way:
    """How resolutions share a backbone."""

    title: str
    method: str
    reestimated: bool = False
    """After training, each resolution's running statistics are measured anew."""


PRIVATE, SHARED, REESTIMATED, INDEPENDENT = WAYS = (
    Way("private scales and biases", "scale_bias"),
    Way("all shared", "shared"),
    Way("all shared, statistics re-estimated", "shared", reestimated=True),
    Way("independent models", "full"),
)


@dataclass(frozen=True)
class Measured:
    """One way with one seed."""

    way: Way
    rate: float
    seed: int
    top1: tuple[float, ...]
    """Percent on the test images, from the lowest resolution to the highest."""
    parameters: int
    """Number for all resolutions together, where a shared parameter counts once."""
    seconds: float
    """Seconds of training."""


@dataclass(frozen=True)
class Cascaded:
    """A cascade over one run's resolutions, measured on the test images."""

    seed: int
    stages: str
    top1: float
    reference: str
    """The best single model by the images that the cascade was fitted on."""
    gain: float
    """Points of top-1 over the reference, with the ends of their 95 % interval."""
    gain_low: float
    gain_high: float
    over_best_on_test: float
    """Points over the model that is best on the test images, which could not be known beforehand."""
    saving: float
    """Percent of the reference's MACs, with the ends of their 95 % interval."""
    saving_low: float
    saving_high: float
    equal: str
    """The cheapest single model about as accurate as the cascade."""
    saving_against_equal: float
    ms: float
    """Milliseconds for an image, with the resize and without decoding."""
    reference_ms: float
    time_ratio: float
    """The cascade's time over the reference's."""


ANSWERS = ("seed", "stages", "top1", "reference", "gain", "gain_low", "gain_high", "over_best_on_test")
COSTS = ("seed", *(field.name for field in fields(Cascaded) if field.name not in ANSWERS))
"""Columns of the two tables about cascades."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=240, help="steps of each resolution")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="tried with the first seed")
    arguments = parser.parse_args()
    steps, seeds = arguments.steps, arguments.seeds
    around = environment()
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(threads(), mp_context=get_context("spawn")) as pool,
    ):

        @cache
        def trained(method: str, rate: float, seed: int) -> Future[Path]:
            return pool.submit(train, Path(folder), method, rate, seed, steps)

        tuned = {(way, rate): trained(way.method, rate, seeds[0]) for way, rate in product(WAYS, arguments.rates)}
        scores = {(way, rate): pool.submit(tune, way, run.result()) for (way, rate), run in tuned.items()}
        tried = {setting: score.result() for setting, score in scores.items()}
        rates = {way: best_rate(tried, way) for way in WAYS}
        runs = [(way, trained(way.method, rates[way], seed)) for seed, way in product(seeds, WAYS)]
        measuring = [pool.submit(measure, way, run.result()) for way, run in runs]
        fitting = [pool.submit(fit, run.result()) for way, run in runs if way is PRIVATE]
        found = [measured.result() for measured in measuring]
        fitted = [future.result() for future in fitting]
        # The processes are idle now, so nothing computes beside what is timed.
        cascades = [cascade(*one) for one in fitted]
    finish(
        arguments.out,
        tables={
            f"Fashion-MNIST, test top-1, mean of {len(seeds)} seeds": [
                summary([measured for measured in found if measured.way == way]) for way in WAYS
            ],
            "Cascades over private scales and biases, test images": [columns(one, ANSWERS) for one in cascades],
            "Their costs, beside the best single model's": [columns(one, COSTS) for one in cascades],
            f"Rates tried, seed {seeds[0]}": [
                {
                    "way": way.title,
                    "rate": rate,
                    "validation top-1": top1,
                    "chosen": "chosen" if rates[way] == rate else "",
                }
                for (way, rate), top1 in tried.items()
            ],
            "Runs": [row(measured) for measured in found],
        },
        environment=around,
        goals=make_goals(found, cascades),
        settings={
            "steps": steps,
            "seeds": seeds,
            "rates": arguments.rates,
            "spec": SPEC.name,
            "timed_batch": BATCH,
            "threads": threads(),
        },
    )


def threads() -> int:
    """Return the number of cores: of runs with one thread each at a time, and of threads for what is timed."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train(folder: Path, method: str, rate: float, seed: int, steps: int) -> Path:
    """Train all resolutions as `multitask train` does, and return the run's directory."""
    changes = {
        "task_defaults": {"method": method},
        "optimizer": {"rate": rate},
        "steps": steps,
        "evaluate_every": max(1, steps // 3),
        "seed": seed,
        "resources": {"threads_per_worker": 1},
        "checkpoints": {"every_minutes": None},
        "directory": str(folder / f"{method}_{rate:g}_{seed}_{steps}"),
    }
    run = multitask.train(load_spec(SPEC, changes), console=Console(file=StringIO()))
    print(f"{method}, rate {rate:g}, seed {seed}: {steps} steps in {run.result['seconds']:.0f} s", flush=True)
    return run.directory


def models_of(way: Way, run: Run) -> dict[str, patches.PatchedModel]:
    """Return task -> its model."""
    return reestimated(run) if way.reestimated else run.models("best")[1]


def reestimated(run: Run) -> dict[str, patches.PatchedModel]:
    """Return the shared network once for each resolution, with running statistics of its own training images."""
    # Not the best version, because it was chosen with the mixed statistics, which these models do not use.
    backbone, _ = run.models("last")
    job = Job(run.spec)
    models = {}
    with torch_threads(run.spec.resources.threads_per_worker):
        for task in run.spec.tasks:
            models[task.name] = patches.attach(backbone, "norm_statistics")
            reestimate_statistics(models[task.name], islice(job.make_batches(f"{task.name}/0"), REESTIMATION_BATCHES))
    return models


def tune(way: Way, directory: Path) -> float:
    """Return a run's mean top-1 over the resolutions, on the validation images that training evaluates on."""
    run = Run(directory)
    models = models_of(way, run)
    with torch_threads(run.spec.resources.threads_per_worker):
        return mean(
            evaluate(models[task.name], table_batches(open_split(task, "validation"), task, task.validation_images))[
                "top1"
            ]
            for task in run.spec.tasks
        )


def best_rate(tried: Mapping[tuple[Way, float], float], way: Way) -> float:
    return max((rate for other, rate in tried if other is way), key=lambda rate: tried[way, rate])


def measure(way: Way, directory: Path) -> Measured:
    """Measure a way's models on the test images."""
    run = Run(directory)
    test = evaluate_models(models_of(way, run), run.spec, "test")
    top1 = tuple(test[task.name]["top1"] for task in run.spec.tasks)
    print(f"{way.title}, seed {run.spec.seed}: {' '.join(f'{value:.2f}' for value in top1)}", flush=True)
    rate, result = run.spec.optimizer.rate, run.result
    return Measured(way, rate, run.spec.seed, top1, result["parameters"], result["seconds"])


def fit(directory: Path) -> tuple[Path, Cascade, Predictions]:
    """Return a cascade over a run's tasks, and the predictions on the test images."""
    return directory, *cascade_from_run(Run(directory), directory / "resolutions.cascade", slack=SLACK)


def cascade(directory: Path, fitted: Cascade, test: Predictions) -> Cascaded:
    """Measure what a cascade over a run's tasks saves."""
    checked = check(fitted, test)
    run = Run(directory)
    _, models = run.models("best")
    views = {task.name: preprocessing(task) for task in run.spec.tasks}
    timed = [CascadeModel(one, models, views) for one in (fitted, alone(fitted, fitted.reference))]
    with torch_threads(threads()):
        seconds, reference_s = time_in_turns(timed, batches(run))
    cascaded = Cascaded(
        seed=run.spec.seed,
        stages=" > ".join(f"{stage.model} {stage.share:.0%}" for stage in checked.stages),
        top1=100 * checked.accuracy.mean,
        reference=fitted.reference,
        gain=100 * checked.accuracy_gain.mean,
        gain_low=100 * checked.accuracy_gain.low,
        gain_high=100 * checked.accuracy_gain.high,
        over_best_on_test=100 * (checked.accuracy.mean - max(single.accuracy for single in checked.singles)),
        saving=100 * checked.saving.mean,
        saving_low=100 * checked.saving.low,
        saving_high=100 * checked.saving.high,
        equal=checked.equal.model,
        saving_against_equal=100 * checked.saving_against_equal.mean,
        ms=1000 * median(seconds) / (BATCH * BATCHES),
        reference_ms=1000 * median(reference_s) / (BATCH * BATCHES),
        time_ratio=median(own / other for own, other in zip(seconds, reference_s, strict=True)),
    )
    print(f"cascade, seed {run.spec.seed}: {cascaded.gain:+.2f} points, {cascaded.saving:.1f} % saved", flush=True)
    return cascaded


def alone(fitted: Cascade, model: str) -> Cascade:
    """Return a cascade of one of its models, which always answers."""
    stage = Stage(model, Rule("top_probability"), None, fitted.costs.alone[model], answered=1, right=1)
    return replace(fitted, points=(OperatingPoint(1.0, (stage,)),), asked=0)


def batches(run: Run) -> list[list[Tensor]]:
    """Return the first test images, decoded."""
    table = open_table(f"{run.spec.tasks[0].data}/test", verify=False)
    decoded = (decode(group.encoded(place)) for group in table.groups() for place in range(len(group)))
    images = list(islice(decoded, BATCH * BATCHES))
    return [images[start : start + BATCH] for start in range(0, len(images), BATCH)]


def time_in_turns(models: Sequence[Answer], images: Sequence[list[Tensor]]) -> list[list[float]]:
    """Return the seconds of each model for all batches, for every repeat after the first, which warms up.

    Each repeat runs the models in the opposite order of the one before.
    """
    taken: list[list[float]] = [[] for _ in models]
    pairs = list(zip(taken, models, strict=True))
    for _ in range(REPEATS + 1):
        for seconds, model in pairs:
            start = time.perf_counter()
            for batch in images:
                model(batch)
            seconds.append(time.perf_counter() - start)
        pairs.reverse()
    return [seconds[1:] for seconds in taken]


def summary(measured: Sequence[Measured]) -> dict[str, Any]:
    averages = [mean(one.top1) for one in measured]
    return {
        "way": measured[0].way.title,
        "rate": measured[0].rate,
        **dict(zip((f"{size} px" for size in resolutions()), means(measured), strict=True)),
        "mean": mean(averages),
        "standard deviation": stdev(averages) if len(averages) > 1 else None,
        "parameters": measured[0].parameters,
        "seconds": mean(one.seconds for one in measured),
    }


def row(measured: Measured) -> dict[str, Any]:
    sizes = {f"{size} px": value for size, value in zip(resolutions(), measured.top1, strict=True)}
    return {"way": measured.way.title, "seed": measured.seed, **sizes, "seconds": measured.seconds}


def columns(cascaded: Cascaded, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(cascaded, name) for name in names}


def resolutions() -> list[int]:
    return [task.resolution for task in load_spec(SPEC).tasks]


def means(measured: Sequence[Measured]) -> list[float]:
    """Return the top-1 of each resolution, as a mean over the seeds."""
    return [mean(values) for values in zip(*(one.top1 for one in measured), strict=True)]


def make_goals(found: Sequence[Measured], cascades: Sequence[Cascaded]) -> list[Goal]:
    by_way: Mapping[Way, list[float]] = {way: means([one for one in found if one.way == way]) for way in WAYS}
    private, shared, independent = (by_way[way] for way in (PRIVATE, SHARED, INDEPENDENT))
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
