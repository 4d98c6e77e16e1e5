"""What every benchmark needs: its arguments, the environment, the goals, the tables and the JSON file."""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from patches.files import write_atomic

PACKAGES = ("torch", "torchvision", "ray")


@dataclass(frozen=True)
class Goal:
    """A promised number and the number that was measured."""

    name: str
    """What `value` measures, and whether it should be at most or at least `goal`."""
    value: float
    goal: float
    holds: bool
    stretch: float | None = None
    """An ambitious number beyond the goal; it is reported and does not count for `holds`."""


def at_most(name: str, value: float, goal: float, stretch: float | None = None) -> Goal:
    return Goal(f"{name}, at most", value, goal, value <= goal, stretch)


def at_least(name: str, value: float, goal: float, stretch: float | None = None) -> Goal:
    return Goal(f"{name}, at least", value, goal, value >= goal, stretch)


def make_parser(question: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option --out, to which a benchmark adds its own options."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file to write")
    return parser


def environment() -> dict[str, Any]:
    """Return the machine, versions and load. Call it before a run, so that the load is that of other programs."""
    load = os.getloadavg()[0]
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": f"cpu: {_processor()}",
        "system": platform.platform(),
        "load_before": round(load, 2),
        "commit": _commit(),
    }


def finish(
    out: Path,
    *,
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    environment: Mapping[str, Any],
    goals: Sequence[Goal],
    settings: Mapping[str, Any],
) -> None:
    """Print tables and goals and write both as JSON, where each row names its table.

    Args:
        tables: title -> rows of plain values by column, None for a missing value; all rows of a table have the same
            columns.
        goals: one for each promised number, also for those that were missed.
        settings: the options of the run.
    """
    assert goals, "a benchmark without a goal answers no question"
    console = Console(width=120)  # a table looks the same in a pipe and on a screen
    for title, rows in tables.items():
        console.print(_table(title, rows))
    console.print(_table("Goals", [asdict(goal) for goal in goals]))
    content = {
        "rows": [{"table": title, **row} for title, rows in tables.items() for row in rows],
        "goals": [asdict(goal) for goal in goals],
        "settings": dict(settings),
        "environment": dict(environment),
    }
    write_atomic(out, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
    console.print(f"Written to {out}")


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """Return the short hash of the checked-out commit, with -dirty at its end when tracked files were changed."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
