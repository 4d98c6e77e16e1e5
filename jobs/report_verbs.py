"""`multitask report`, and the report that a training ends with."""

import sys
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def report(run: Annotated[Path, typer.Argument(help="A directory that `multitask train` wrote.")]) -> None:
    """Evaluate a finished run's best version on the validation tables, and write RUN/report.html."""
    print(_write_report(run))


def report_after_training(run: Path) -> None:
    """Write the report of a run that has just finished. The run stays a finished one, whatever happens."""
    try:
        print(f"report: {_write_report(run)}", file=sys.stderr)
    except (Exception, KeyboardInterrupt) as error:
        why = "it was interrupted" if isinstance(error, KeyboardInterrupt) else error
        print(
            f"The training has finished, but its report is not written: {why}\n"
            f"`multitask report {quote(str(run))}` writes it.",
            file=sys.stderr,
        )


def _write_report(run: Path) -> Path:
    """Write a report, and show on standard error how far the evaluation is."""
    from multitask import write_report

    columns = (TextColumn("report"), BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("report", total=None)
        return write_report(run, lambda done, total: bar.update(task, completed=done, total=total))
