"""How far a run is: what the server counts, and what a checkpoint says beside the tensors."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any, Self

RENAMED = {"refused": "rejected", "turned_away": "rejected_calls"}
"""Name of a counter in the files of version 0.1 -> its name now."""


@dataclass
class WorkerProgress:
    """One worker's steps. `redone`, `lost` and `rejected` count steps, each at most once for one kind."""

    step: int = 0
    """Steps made, the next step's number."""
    position: int = 0
    """Rows of its stream consumed up to there."""
    private_step: int = 0
    """Steps that the private tensors which it holds have learned from: fewer while it makes lost steps again."""
    private_position: int = 0
    lap: int = 0
    """Steps that the slowest worker had made when this one joined the run; bounds count from here."""
    redone: int = 0
    lost: int = 0
    """Steps that were newer than the checkpoint to which the server went back."""
    rejected: int = 0


@dataclass
class Progress:
    """The run's counters."""

    version: int = 0
    """Updates of the shared values."""
    rounds: Fraction = Fraction(0)
    workers: dict[str, WorkerProgress] = field(default_factory=dict)
    first_round: dict[str, int] = field(default_factory=dict)
    """Task -> the run's round when it joined: its private tensors follow the schedule from there."""
    best_top1: float = -math.inf
    """Mean validation top-1 of the best version so far, in percent."""
    rejected_calls: int = 0
    """Pushes and joins of unknown workers, and of processes whose place another one took: no steps of anybody."""

    def to_json(self) -> dict[str, Any]:
        best = None if math.isinf(self.best_top1) else self.best_top1
        return asdict(self) | {"rounds": str(self.rounds), "best_top1": best}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        content = with_current_names(content)
        best = content["best_top1"]
        changed = {
            "rounds": Fraction(content["rounds"]),
            "workers": {
                name: WorkerProgress(**with_current_names(worker)) for name, worker in content["workers"].items()
            },
            "best_top1": -math.inf if best is None else best,
        }
        return cls(**{**content, **changed})

    def with_workers(self, workers: Mapping[str, str]) -> "Progress":
        """The same moment for another set of workers: those that are new begin, those that left are forgotten.

        Args:
            workers: worker -> its task.
        """
        laps = [worker.lap + worker.step for worker in self.workers.values()]
        known = {name.rpartition("/")[0] for name in self.workers}
        joined = {task: math.floor(self.rounds) for task in workers.values() if task not in known}
        return replace(
            self,
            workers={name: self.workers.get(name) or WorkerProgress(lap=min(laps, default=0)) for name in workers},
            first_round={task: self.first_round.get(task, joined.get(task, 0)) for task in workers.values()},
            best_top1=-math.inf if known != set(workers.values()) else self.best_top1,
        )


def with_current_names(counters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counters of a checkpoint or a status under their current names; version 0.1 used other names."""
    return {RENAMED.get(name, name): value for name, value in counters.items()}
