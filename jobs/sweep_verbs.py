"""`multitask sweep`: train a job with many settings, and keep the best."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from jobs.tables import show

if TYPE_CHECKING:
    from multitask.sweep import TrialOutcome


def sweep(
    spec: Annotated[Path, typer.Argument(help="A sweep spec (YAML), for example jobs/specs/sweep_lr.yaml.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the sweep of this spec; finished trials are not repeated.")
    ] = False,
    mlflow_uri: Annotated[
        str | None,
        typer.Option(help="MLflow store that tracks the sweep; by default an SQLite file beside its directory."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")] = False,
) -> None:
    """Train a job once for each of many settings, and choose the best setting by validation."""
    from multitask import Stopped
    from multitask.sweep import run_sweep
    from multitask.sweep.outcomes import rows
    from multitask.sweep.summary import headline

    try:
        result = run_sweep(spec, go_on=resume, mlflow_uri=mlflow_uri)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        raise typer.Exit(stop.exit_status) from None
    found = rows(result.outcomes)
    best = None if result.choice is None else result.choice.trial.number
    if json_output:
        test = None if result.verdict is None else result.verdict.tasks
        print(json.dumps({"best": best, "test": test, "trials": found}))
    else:
        _show(result.outcomes)
        settings = len({outcome.plan.setting for outcome in result.outcomes})
        print(headline(settings, result.choice, result.verdict))
        print(f"report:     {result.directory}/report.html\nall trials: {result.directory}/trials.csv, trials.parquet")
    failed = [row for row in found if row["state"] not in ("finished", "stopped")]
    for row in failed:
        print(f"trial {row['trial']} {row['state']}: {row['error'] or 'its process is gone'}", file=sys.stderr)
    if result.choice is None:
        raise RuntimeError(f"No setting's trials have all finished; {result.directory}/trials.csv says what happened.")
    if not json_output:
        print(f"Next: multitask train {result.directory}/best.yaml")


def _show(outcomes: "Sequence[TrialOutcome]") -> None:
    """Print the best trials as a table."""
    from multitask.sweep.board import BEST_SHOWN
    from multitask.sweep.summary import trial_header, trial_rows

    table = Table(*trial_header(outcomes), title="Best trials by validation", title_justify="left")
    for line in trial_rows(outcomes)[:BEST_SHOWN]:
        table.add_row(*line)
    show(table)
