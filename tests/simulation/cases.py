"""Schedules that once failed, as files: a seed may mean another schedule when the generator changes."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from tests.simulation.schedule import Schedule

FOLDER = Path(__file__).parent / "cases"
_ADAPTER = TypeAdapter(Schedule)


def save(name: str, about: str, schedule: Schedule) -> Path:
    """Write a schedule as a case.

    Args:
        about: a sentence that says what it once showed.
    """
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.yaml"
    content: dict[str, Any] = {
        "about": about,
        "schedule": _ADAPTER.dump_python(schedule, mode="json", exclude_defaults=True),
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False, width=118))
    return path


def load(name: str) -> Schedule:
    """Read a case."""
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return _ADAPTER.validate_python(content["schedule"])


def names() -> list[str]:
    """Return the names of all cases."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))
