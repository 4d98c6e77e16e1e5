"""What a run tells MLflow, as records that fit on a line of JSON each.

Each record may be sent twice without further effect, because a process that is killed may not note what it has sent.
"""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

CONFIG = ConfigDict(extra="forbid", strict=True)
Task = str | None
"""Name of a task's run, or None for the run itself."""
Point = tuple[str, float | None, int, int]
"""Name, value, Unix time in milliseconds, and step of one number of a metric. None stands for NaN."""
Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Metrics:
    """Numbers of the run or of one task."""

    kind: Literal["metrics"] = "metrics"
    task: Task
    points: list[Point]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Tag:
    """A tag of the run or of one task; a later value replaces an earlier one."""

    kind: Literal["tag"] = "tag"
    task: Task
    name: str
    value: str


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Text:
    """An artifact of the run with the given text."""

    kind: Literal["text"] = "text"
    name: str
    text: str


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Artifact:
    """A copy of a file or a directory."""

    kind: Literal["artifact"] = "artifact"
    task: Task
    path: str
    """Absolute, or relative to the folder of the outbox."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Open:
    """The run and the runs of these tasks begin, or go on."""

    kind: Literal["open"] = "open"
    tasks: list[str]
    time_ms: int


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class End:
    """The run and the runs of its tasks have ended."""

    kind: Literal["end"] = "end"
    status: Status
    time_ms: int


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Lost:
    """Another run, whose process is gone, has failed."""

    kind: Literal["lost"] = "lost"
    run_id: str


Record = Metrics | Tag | Text | Artifact | Open | End | Lost
_ADAPTER: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])


def to_line(record: Record) -> bytes:
    """Return a record as a line of JSON, with its end of line."""
    return _ADAPTER.dump_json(record) + b"\n"


def from_line(line: bytes) -> Record:
    """Return the record of a line.

    Raises:
        ValueError: the line holds no record.
    """
    return _ADAPTER.validate_json(line)
