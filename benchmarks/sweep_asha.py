"""Does asynchronous successive halving find the grid's setting with half of its rounds?

The shipped sweep runs from one source backbone: first every trial at full length (the grid), then under ASHA, for
several orders of the trials. Whether ASHA stops a trial depends on which trials came to that milestone before it.
Therefore the trials run one at a time, so that an order has one result; with two at a time, each run would depend on
which came first. The accuracy of ASHA's choice is the accuracy that its setting has in the grid: the same job at full
length, with the same seed.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks._common import at_most, environment, finish, make_parser
from multitask.cluster.session import ray_session
from multitask.run.live import read_status
from multitask.sweep import SweepResult, SweepSpec, load_sweep, run_sweep
from multitask.sweep.outcomes import Choice, TrialOutcome
from multitask.sweep.plan import describe
from multitask.sweep.run import SOURCE_BACKBONE
from multitask.sweep.spec import AshaScheduler

SPEC = Path(__file__).parent.parent / "jobs" / "specs" / "sweep_lr.yaml"


@dataclass(frozen=True)
class Swept:
    """A sweep that ran to its end."""

    outcomes: Sequence[TrialOutcome]
    choice: Choice
    rounds: Sequence[int]
    """Rounds that each trial made, including the last one before it stopped."""
    minutes: float
    """Minutes; those of the grid include the training of its source."""


def main() -> None:
    spec = load_sweep(SPEC)
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=spec.job["steps"], help="of a trial of full length")
    parser.add_argument("--grace-rounds", type=int, default=25, help="first milestone, and rounds between evaluations")
    parser.add_argument("--reduction", type=float, default=3.0)
    parser.add_argument("--orders", type=int, default=2, help="orders of the trials that ASHA runs with")
    arguments = parser.parse_args()
    if not 1 <= arguments.grace_rounds < arguments.steps:
        parser.error(f"--grace-rounds is {arguments.grace_rounds}; give 1 or more, and fewer than --steps")
    if arguments.reduction <= 1 or arguments.orders < 1:
        parser.error("--reduction has to be above 1, and --orders 1 or more")
    around = environment()
    job = {**spec.job, "steps": arguments.steps, "evaluate_every": arguments.grace_rounds}
    spec = replace(spec, retrain=False, test=False, job=job)
    scheduler = AshaScheduler(name="asha", grace_rounds=arguments.grace_rounds, reduction=arguments.reduction)
    with tempfile.TemporaryDirectory() as name, ray_session():
        folder = Path(name)
        grid = run(replace(spec, name="grid", directory=str(folder / "grid")), {"finished"})
        halved = [
            run(halving(spec, folder, scheduler, order), {"finished", "stopped"}) for order in range(arguments.orders)
        ]
    for asha in halved:
        check_bits(grid, asha)
    rows = [row("grid", grid, grid), *(row(f"ASHA, order {order}", asha, grid) for order, asha in enumerate(halved))]
    goals = [
        at_most(
            "rounds under ASHA as a share of the grid's, most of all orders", max(r["share"] for r in rows[1:]), 0.5
        ),
        at_most("points of ASHA's choice below the grid's, most of all orders", max(r["below"] for r in rows[1:]), 0.5),
    ]
    settings = {key: value for key, value in vars(arguments).items() if key != "out"}
    tables = {"Sweeps": rows, "Trials": trials(grid, halved)}
    finish(arguments.out, tables=tables, environment=around, goals=goals, settings=settings)


def halving(spec: SweepSpec, folder: Path, scheduler: AshaScheduler, order: int) -> SweepSpec:
    """Return the sweep of the grid's trials under ASHA, from the backbone that the grid's source has trained."""
    backbone = {**spec.job["backbone"], "weights": str(folder / "grid" / SOURCE_BACKBONE)}
    return replace(
        spec,
        name=f"asha_{order}",
        directory=str(folder / f"asha_{order}"),
        job={**spec.job, "backbone": backbone},
        source=None,
        scheduler=scheduler,
        concurrent=1,
        seed=order,
    )


def run(spec: SweepSpec, ends: set[str]) -> Swept:
    """Run a sweep, and raise SystemExit if a trial ended in another state than those given.

    A sweep that returns was not stopped, so the scheduler has stopped every stopped trial.
    """
    start = time.perf_counter()
    result: SweepResult = run_sweep(spec, console=Console(quiet=True))
    minutes = (time.perf_counter() - start) / 60
    for outcome in result.outcomes:
        if outcome.state not in ends:
            trial = f"Trial {outcome.plan.number} of '{spec.name}' ({describe(outcome.plan.values)})"
            raise SystemExit(f"{trial} ended as {outcome.state}, so there is nothing to compare: {outcome.error}")
    assert result.choice is not None, "what comes first passes every milestone"
    return Swept(result.outcomes, result.choice, [rounds_made(outcome) for outcome in result.outcomes], minutes)


def rounds_made(outcome: TrialOutcome) -> int:
    (task,) = read_status(outcome.plan.directory)["tasks"].values()
    return int(task["made"])


def check_bits(grid: Swept, asha: Swept) -> None:
    """Check that ASHA's trials have the bits of the grid's trials, as far as they went."""
    for of_grid, of_asha in zip(grid.outcomes, asha.outcomes, strict=True):
        assert of_asha.curve == of_grid.curve[: len(of_asha.curve)], describe(of_grid.plan.values)


def row(name: str, sweep: Swept, grid: Swept) -> dict[str, Any]:
    states = [outcome.state for outcome in sweep.outcomes]
    at_full_length = grid.outcomes[sweep.choice.trial.number].top1
    assert at_full_length is not None
    return {
        "sweep": name,
        "finished": states.count("finished"),
        "stopped": states.count("stopped"),
        "rounds": sum(sweep.rounds),
        "share": sum(sweep.rounds) / sum(grid.rounds),
        "minutes": sweep.minutes,
        "choice": describe(sweep.choice.trial.values),
        "top-1 %": at_full_length,
        "below": grid.choice.top1 - at_full_length,
    }


def trials(grid: Swept, halved: Sequence[Swept]) -> list[dict[str, Any]]:
    """Return what each setting reached in the grid, and how far ASHA let it go."""
    return [
        {"setting": describe(outcome.plan.values), "top-1 %": outcome.top1}
        | {f"rounds, order {order}": asha.rounds[number] for order, asha in enumerate(halved)}
        for number, outcome in enumerate(grid.outcomes)
    ]


if __name__ == "__main__":
    main()
