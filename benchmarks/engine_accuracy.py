"""Does it matter for accuracy how gradients meet? Engines `async` and `sync` on the demo's task, at equal steps.

Both engines train the demo's first way (three tasks, private scale-and-bias, everything else learned together) with
real actors. Each engine's rate is the best of a grid by validation top-1 with seed 0. Then both train with three seeds
at their own rate, and the best version of each run is evaluated on the test tables. At equal steps both compute the
same number of gradients; `async` makes three updates from them where `sync` makes one from their mean.
`--equal-updates` adds `sync` with as many updates of the shared tensors as `async` makes, which takes three times the
images.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from rich.console import Console

import multitask
from benchmarks._common import Goal, at_most, environment, finish, make_parser
from multitask.cluster.session import ray_session
from multitask.run.directory import evaluate_models
from multitask.spec.reading import load_spec

SPEC = Path(__file__).parent.parent / "jobs" / "specs" / "demo.yaml"
ENGINES = ("async", "sync")
EQUAL_UPDATES = "sync, equal updates"
RATES = (0.003, 0.006, 0.012)
"""The demo's rate and larger ones."""
SEEDS = (0, 1, 2)
GOAL_POINTS = 1.0


@dataclass(frozen=True)
class Trained:
    """Accuracies of a run's best version in percent, as means over the tasks."""

    engine: str
    rate: float
    seed: int
    steps: int
    updates: int
    """Number of updates of the shared tensors, from the pushes of the workers."""
    validation: float
    test: float
    seconds: float
    staleness: float


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=240, help="steps of each task")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="tried with the first seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--equal-updates", action="store_true", help="also `sync` with as many updates as `async`")
    arguments = parser.parse_args()
    demo = load_spec(SPEC)
    steps = arguments.steps
    around = environment()
    tried: list[Trained] = []
    runs: dict[str, list[Trained]] = {}
    with tempfile.TemporaryDirectory() as name, ray_session():
        for engine in ENGINES:
            tried += [train(Path(name), engine, rate, arguments.seeds[0], steps) for rate in arguments.rates]
        rates = {engine: best_rate(tried, engine) for engine in ENGINES}
        first = {trained.engine: trained for trained in tried if trained.rate == rates[trained.engine]}
        runs = {engine: [first[engine]] for engine in ENGINES}
        for seed in arguments.seeds[1:]:
            for engine in ENGINES:
                runs[engine].append(train(Path(name), engine, rates[engine], seed, steps))
        if arguments.equal_updates:
            longer = steps * len(demo.tasks)
            runs[EQUAL_UPDATES] = [train(Path(name), "sync", rates["sync"], seed, longer) for seed in arguments.seeds]
    finish(
        arguments.out,
        tables={
            f"Rates tried, seed {arguments.seeds[0]}": [tried_row(trained, rates) for trained in tried],
            f"Test top-1, mean over the tasks, {len(arguments.seeds)} seeds": [summary(*row) for row in runs.items()],
            "Runs": [vars(trained) | {"engine": name} for name, found in runs.items() for trained in found],
        },
        environment=around,
        goals=[make_goal(runs)],
        settings={
            "spec": SPEC.name,
            "steps": steps,
            "rates": arguments.rates,
            "seeds": arguments.seeds,
            "chosen": rates,
            "at_the_edge_of_the_grid": {
                engine: rate in (min(arguments.rates), max(arguments.rates)) for engine, rate in rates.items()
            },
        },
    )


def train(folder: Path, engine: str, rate: float, seed: int, steps: int) -> Trained:
    """Train as `multitask train` does, and evaluate the best version on the test tables."""
    options = {"name": engine} | ({"in_flight": 0} if engine == "async" else {})
    changes = {
        "directory": str(folder / f"{engine}_{rate:g}_{seed}_{steps}"),
        "steps": steps,
        # At the same fractions of the run as the demo.
        "evaluate_every": max(1, steps // 3),
        "seed": seed,
        "engine": options,
        "optimizer": {"rate": rate},
        "checkpoints": {"every_minutes": None},
        # As in the results so far; the demo's spec has smaller batches, to be done sooner.
        "task_defaults": {"batch_size": 128},
    }
    run = multitask.train(load_spec(SPEC, changes), console=Console(file=StringIO()))
    _, models = run.models("best")
    test = evaluate_models(models, run.spec, "test")
    tasks = run.result["tasks"].values()
    trained = Trained(
        engine=engine,
        rate=rate,
        seed=seed,
        steps=steps,
        updates=run.result["last"]["version"],
        validation=mean(metrics["top1"] for metrics in run.result["best"]["tasks"].values()),
        test=mean(metrics["top1"] for metrics in test.values()),
        seconds=run.result["seconds"],
        staleness=mean(task["mean_staleness"] for task in tasks),
    )
    print(f"{engine}, rate {rate:g}, seed {seed}: test {trained.test:.2f} after {trained.seconds:.0f} s", flush=True)
    return trained


def best_rate(tried: Sequence[Trained], engine: str) -> float:
    return max((trained for trained in tried if trained.engine == engine), key=lambda trained: trained.validation).rate


def tried_row(trained: Trained, rates: Mapping[str, float]) -> dict[str, Any]:
    chosen = rates[trained.engine] == trained.rate
    return {
        "engine": trained.engine,
        "rate": trained.rate,
        "validation top-1": trained.validation,
        "chosen": "chosen" if chosen else "",
    }


def summary(name: str, runs: Sequence[Trained]) -> dict[str, Any]:
    tests = [trained.test for trained in runs]
    return {
        "engine": name,
        "rate": runs[0].rate,
        "steps": runs[0].steps,
        "updates": runs[0].updates,
        "mean": mean(tests),
        "lowest": min(tests),
        "highest": max(tests),
        "standard deviation": stdev(tests) if len(tests) > 1 else None,
        "staleness": mean(trained.staleness for trained in runs),
        "seconds": median(trained.seconds for trained in runs),
    }


def make_goal(runs: Mapping[str, Sequence[Trained]]) -> Goal:
    means = [mean(trained.test for trained in runs[engine]) for engine in ENGINES]
    name = f"Mean test top-1 of {ENGINES[0]} - that of {ENGINES[1]} at equal steps, points, either way"
    return at_most(name, abs(means[0] - means[1]), GOAL_POINTS)


if __name__ == "__main__":
    main()
