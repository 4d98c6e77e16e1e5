"""Does asynchronous successive halving find the grid's setting with half of its rounds?

The shipped sweep runs twice from one source backbone: every trial at full length, and under ASHA. A trial that ASHA
lets through to its end is the grid's trial, seed and all, so the accuracies of the two choices can be compared as they
stand.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks._common import at_most, environment, finish, make_parser
from multitask.engines.served import ray_session
from multitask.sweep import SweepResult, SweepSpec, load_sweep, run_sweep
from multitask.sweep.plan import describe
from multitask.sweep.run import SOURCE_BACKBONE
from multitask.sweep.spec import AshaScheduler

SPEC = Path(__file__).parent.parent / "jobs" / "specs" / "sweep_lr.yaml"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--grace-rounds", type=int, default=25, help="first milestone, and rounds between evaluations")
    parser.add_argument("--reduction", type=float, default=3.0)
    arguments = parser.parse_args()
    around = environment()
    spec = load_sweep(SPEC)
    spec = replace(spec, retrain=False, test=False, job={**spec.job, "evaluate_every": arguments.grace_rounds})
    with tempfile.TemporaryDirectory() as name, ray_session():
        folder = Path(name)
        grid = run(replace(spec, name="grid", directory=str(folder / "grid")))
        scheduler = AshaScheduler(name="asha", grace_rounds=arguments.grace_rounds, reduction=arguments.reduction)
        asha = run(halved(spec, folder, scheduler))
    rows = [row("grid", grid), row("asha", asha)]
    goals = [
        at_most("rounds of ASHA's trials, as a share of the grid's", rows[1]["rounds"] / rows[0]["rounds"], 0.5),
        at_most("points of ASHA's choice below the grid's", rows[0]["top-1 %"] - rows[1]["top-1 %"], 0.5),
    ]
    settings = {key: value for key, value in vars(arguments).items() if key != "out"}
    finish(arguments.out, tables={"Choices": rows}, environment=around, goals=goals, settings=settings)


def halved(spec: SweepSpec, folder: Path, asha: AshaScheduler) -> SweepSpec:
    """The same trials under ASHA, from the backbone that the grid's source has trained."""
    backbone = {**spec.job["backbone"], "weights": str(folder / "grid" / SOURCE_BACKBONE)}
    job = {**spec.job, "backbone": backbone}
    return replace(spec, name="asha", directory=str(folder / "asha"), job=job, source=None, scheduler=asha)


def run(spec: SweepSpec) -> SweepResult:
    return run_sweep(spec, console=Console(quiet=True))


def row(name: str, result: SweepResult) -> dict[str, Any]:
    assert result.choice is not None
    return {
        "sweep": name,
        "rounds": sum(outcome.rounds for outcome in result.outcomes),
        "stopped": sum(outcome.state == "stopped" for outcome in result.outcomes),
        "choice": describe(result.choice.trial.values),
        "top-1 %": result.choice.top1,
    }


if __name__ == "__main__":
    main()
