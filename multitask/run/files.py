"""What the trainer writes about a run as JSON, and how it is read back: the status, the result, a version's facts."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError

from multitask.errors import RunError
from multitask.server.progress import with_current_names
from patches.files import read_regular
from patches.quoting import shortened

Number = Annotated[int, Strict()] | Annotated[float, Strict()]
Count = Annotated[int, Strict(), Field(ge=0)]
Seconds = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Record = TypeVar("Record")
STATUS_REMEDY = (
    "It only shows how the run stands. Without this file, `multitask resume RUN` goes on from the last checkpoint, so "
    "move it away."
)
RESULT_REMEDY = (
    "Restore it from a copy. Without this file, `multitask resume RUN` goes on from the last checkpoint and writes it "
    "again."
)
VERSION_REMEDY = "Restore it from a copy, or use the run's other version (best or last)."
"""What to do if a file of a run is damaged."""


def _having(*keys: str) -> AfterValidator:
    """Return a check that a mapping has these keys."""

    def check(found: dict[str, Any]) -> dict[str, Any]:
        if missing := sorted(set(keys) - found.keys()):
            raise ValueError(f"{', '.join(missing)} missing")
        return found

    return AfterValidator(check)


Metrics = Annotated[dict[str, Number], _having("top1", "top5", "loss")]
Point = Annotated[dict[str, Number], _having("step", "version", "top1")]


@dataclass
class TaskStatus:
    """The counts and measurements of a task, as the status file has them."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    steps: Count
    """Number of steps that all its workers together have to make."""
    made: Count = 0
    """Number of steps that they have made."""
    pushes: Count = 0
    """Number of pushes that were applied to the shared tensors."""
    staleness: Count = 0
    """Sum of the staleness of these pushes."""
    redone: Count = 0
    lost: Count = 0
    rejected: Count = 0
    skipped: Count = 0
    """Number of images that could not be decoded."""
    bad_images: list[str] = field(default_factory=list)
    processes: dict[str, Annotated[int, Strict()]] = field(default_factory=dict)
    """Worker -> id of the process that made its last step."""
    curve: list[Point] = field(default_factory=list)
    """Validation metrics of each evaluated version, with its round as `step`."""
    latest: dict[str, Number] = field(default_factory=dict)
    """Loss, rate, staleness and images per second of the last step; empty before the first step."""


@dataclass
class RunStatus:
    """The status of a run, as its file has it."""

    name: str
    state: Literal["running", "finished", "stopped", "failed"]
    engine: str
    tasks: dict[str, TaskStatus]
    process: Annotated[int, Strict(), Field(gt=0, lt=2**31)]
    """Id of the driver's process."""
    host: str
    """Name of the driver's machine."""
    updated: Seconds
    """Time of writing, in seconds since 1970."""
    process_start: Count | None = None
    """Time at which the driver's process started, in clock ticks since its machine did."""
    error: str | None = None
    """What ended a failed run."""
    mlflow_run_id: str | None = None
    mlflow_task_runs: dict[str, Count] = field(default_factory=dict)
    """Task -> the number of MLflow runs that tasks of this name have had."""
    rejected_calls: Count = 0


@dataclass
class VersionFacts:
    """What a file of a version and the result say about the version."""

    version: Count
    round: Count
    tasks: dict[str, Metrics]


@dataclass
class RunResult:
    """The part of a run's result that the program reads back."""

    last: VersionFacts
    best: VersionFacts
    trained_parameters: Count
    seconds: Seconds


def read_json(path: Path, remedy: str) -> Any:
    """Read a JSON file that the trainer wrote.

    Args:
        remedy: what to do if the file is damaged, for the message.
    Raises:
        RunError: there is no such file, it cannot be read, or it is damaged.
    """
    try:
        # `patches.strict_json` would refuse NaN, which a loss may be.
        content = json.loads(text := read_regular(path).decode())
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()  # half of a surrogate pair is no text that can be written
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error, remedy) from error
    return content


def checked(kind: Callable[..., Record], content: Any, where: str | Path, remedy: str) -> Record:
    """Return what a JSON file holds as a dataclass. Keys that the dataclass does not have are ignored.

    Args:
        where: name of the file in messages.
        remedy: what to do if the file is damaged, for the message.
    Raises:
        RunError: a value is missing or has another type.
    """
    try:
        record: Record = _adapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise damaged(where, f"{place!a:.100}: {first['msg']}", remedy) from None
    return record


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def damaged(where: str | Path, why: object, remedy: str) -> RunError:
    """Return the error for a damaged file of a run."""
    return RunError(f"'{where}' is damaged: {shortened(why)}. {remedy}")


def checked_status(content: Any, where: str | Path) -> dict[str, Any]:
    """Return the content of a status file with every key of `RunStatus`. Keys of version 0.1 get their present names.

    Raises:
        RunError: the file is damaged.
    """
    if not isinstance(content, dict):
        raise damaged(where, f"found {type(content).__name__}, expected keys and values", STATUS_REMEDY)
    content = with_current_names(content)
    tasks = content.get("tasks")
    if isinstance(tasks, dict):
        named = {name: with_current_names(task) if isinstance(task, dict) else task for name, task in tasks.items()}
        content["tasks"] = named
    return content | asdict(checked(RunStatus, content, where, STATUS_REMEDY))
