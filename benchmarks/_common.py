"""What every benchmark shares: arguments, the environment, the table and the JSON file."""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from patches.files import write_atomic


@dataclass(frozen=True)
class Goal:
    """A promised number, kept or missed."""

    name: str
    value: float
    goal: float
    at_least: bool = True

    @property
    def holds(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def main(question: str, measure: Callable[[], tuple[list[dict[str, Any]], list[Goal]]]) -> None:
    """Run `python -m benchmarks.NAME --out FILE`: measure, print the rows and the goals, write them as JSON."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    rows, goals = measure()
    console = Console(width=140)
    console.print(_table(question, rows))
    told = [{"name": g.name, "value": g.value, "goal": g.goal, "holds": g.holds} for g in goals]
    console.print(_table("goals", told))
    content = {"question": question, "rows": rows, "environment": environment(), "goals": told}
    write_atomic(arguments.out, (json.dumps(content, indent=2) + "\n").encode())


def environment() -> dict[str, Any]:
    """Versions, cores, device and commit: what a number means depends on them."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "ray")},
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": commit.strip() or None,
    }


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:,.4g}" if isinstance(value, float) else f"{value}" for value in row.values()))
    return table
