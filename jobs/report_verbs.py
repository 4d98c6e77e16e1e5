"""`multitask report`, and the report that a training ends with."""

import sys
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from multitask.progress import showing_rows


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

    with showing_rows("report") as on_images:
        return write_report(run, on_images)
