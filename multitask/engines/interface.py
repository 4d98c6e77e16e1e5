"""What every engine gets and gives back."""

from collections.abc import Callable
from dataclasses import dataclass

from multitask.server.messages import Evaluation, Snapshot, StepRecord


@dataclass(frozen=True)
class Outcome:
    """What an engine hands back when all workers have made their steps."""

    versions: dict[str, Snapshot]
    """The versions `last` and `best`."""
    processes: dict[str, int]
    """Worker -> id of the process it ran in."""


Watch = Callable[[list[StepRecord], list[Evaluation]], None]
"""Called now and then with what happened since the last call."""
