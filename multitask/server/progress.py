"""Progress of a run: the counters that the server keeps, and that a checkpoint stores beside the tensors."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from typing import Any, Self

RENAMED = {"refused": "rejected", "turned_away": "rejected_calls"}
"""Name of a counter in the files of version 0.1 -> its name now."""
FRACTION = re.compile(r"[0-9]{1,1000}(/0*[1-9][0-9]{0,999})?")
"""Text of the rounds in a checkpoint. Without its limit, a short text such as 1e999999999 would fill the memory."""


@dataclass
class WorkerProgress:
    """The counters of one worker."""

    step: int = 0
    """Number of steps made, which is also the number of the next step."""
    position: int = 0
    """Number of rows of the worker's data stream that those steps have consumed."""
    private_step: int = 0
    """In a checkpoint: number of steps that the saved private tensors of the worker have learned from.

    It is below `step` while the worker makes steps again after it was lost."""
    private_position: int = 0
    """In a checkpoint: position of the worker's data stream after `private_step` steps."""
    lap: int = 0
    """Number of steps that the slowest worker had made when this worker joined the run; see `reached`."""
    redone: int = 0
    """Number of steps that the worker made again after it was lost."""
    lost: int = 0
    """Number of steps that were newer than the checkpoint to which the server went back."""
    rejected: int = 0
    """Number of steps whose push was rejected."""

    @property
    def reached(self) -> int:
        """Number of steps that `bounded` compares between workers: `lap` plus the worker's own steps."""
        return self.lap + self.step


@dataclass
class Progress:
    """The run's counters."""

    version: int = 0
    """Number of updates of the server's values."""
    rounds: Fraction = Fraction(0)
    """Number of rounds done; a step counts as a part of a round."""
    workers: dict[str, WorkerProgress] = field(default_factory=dict)
    first_round: dict[str, int] = field(default_factory=dict)
    """Task -> the round in which it joined the run. The schedule of its private tensors starts in that round."""
    best_top1: float = -math.inf
    """Mean validation top-1 of the best version so far, in percent."""
    rejected_calls: int = 0
    """Number of pushes and joins that came from unknown workers or from processes that were replaced.

    They count as no worker's steps."""

    def copy(self) -> "Progress":
        """Return a copy that changes of this object leave alone."""
        workers = {name: WorkerProgress(**vars(counters)) for name, counters in self.workers.items()}
        return replace(self, workers=workers, first_round=dict(self.first_round))

    def to_json(self) -> dict[str, Any]:
        """Return the counters as JSON can hold them."""
        best = None if math.isinf(self.best_top1) else self.best_top1
        return asdict(self) | {"rounds": str(self.rounds), "best_top1": best}

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """Return the counters that `to_json` wrote, in this version or in version 0.1.

        Raises:
            ValueError: the content is something else. The message says what.
        """
        content = _fields(cls, content, "the progress")
        workers = {
            name: WorkerProgress(**_counts(_fields(WorkerProgress, worker, f"worker {_shown(name)}")))
            for name, worker in _mapping(content.pop("workers"), "workers").items()
        }
        first_round = _counts(_mapping(content.pop("first_round"), "first_round"))
        rounds, best = content.pop("rounds"), content.pop("best_top1")
        if not isinstance(rounds, str) or not FRACTION.fullmatch(rounds):
            raise ValueError(f"rounds is {_shown(rounds)}, expected a fraction such as '7/2'")
        if best is not None and (type(best) not in (int, float) or not 0 <= best <= 100):
            raise ValueError(f"best_top1 is {_shown(best)}, expected percent or null")
        return cls(
            **_counts(content),
            workers=workers,
            first_round=first_round,
            rounds=Fraction(rounds),
            best_top1=-math.inf if best is None else best,
        )

    def with_workers(self, workers: Mapping[str, str]) -> "Progress":
        """Return the progress for another set of workers: new workers start at step 0, workers that left are forgotten.

        Args:
            workers: worker -> its task.
        """
        reached = [worker.reached for worker in self.workers.values()]
        known = {name.rpartition("/")[0] for name in self.workers}
        joined = {task: math.floor(self.rounds) for task in workers.values() if task not in known}
        return replace(
            self,
            workers={name: self.workers.get(name) or WorkerProgress(lap=min(reached, default=0)) for name in workers},
            first_round={task: self.first_round.get(task, joined.get(task, 0)) for task in workers.values()},
            best_top1=-math.inf if known != set(workers.values()) else self.best_top1,
        )


def with_current_names(counters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counters of a checkpoint or a status under their current names; version 0.1 used other names."""
    return {RENAMED.get(name, name): value for name, value in counters.items()}


def _fields(kind: type, content: Any, name: str) -> dict[str, Any]:
    """Return the values of a dataclass that JSON holds, under their current names.

    Raises:
        ValueError: a field is missing, or there is a key that is no field.
    """
    found = with_current_names(_mapping(content, name))
    expected = {field.name for field in fields(kind)}
    if found.keys() != expected:
        raise ValueError(f"{name} has other keys than expected: {_shown(sorted(found.keys() ^ expected))}")
    return found


def _mapping(content: Any, name: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{name} is {_shown(content)}, expected keys and values")
    return content


def _counts(found: dict[str, Any]) -> dict[str, int]:
    """Check that all values are whole numbers from 0 on."""
    for name, value in found.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{_shown(name)} is {_shown(value)}, expected a whole number from 0 on")
    return found


def _shown(value: Any) -> str:
    """Return a value as it may stand in a message."""
    return f"{value!a:.60}"
