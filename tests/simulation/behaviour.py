"""How the workers of a toy job behave: how long their steps take, and in which steps something goes wrong."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal
from zlib import crc32

FIRST_PROCESS = 0
"""Number of the first process of a worker in a run."""


class StillClock:
    """A virtual time that goes on while somebody sleeps, and only then."""

    def __init__(self) -> None:
        self._now, self._asked = 0.0, 0

    def monotonic(self) -> float:
        return self._now

    def time_ns(self) -> int:
        self._asked += 1
        return self._asked

    def sleep(self, seconds: float, /) -> None:
        self._now += seconds


@dataclass(frozen=True)
class StepFault:
    """What goes wrong in a step."""

    kind: Literal["none", "nan-shared", "nan-private", "raise", "slow", "hang"]
    """`nan-shared`, `nan-private`: a gradient of this kind is not finite. `raise`: the worker raises `ToyError`.
    `slow`: the step takes longer. `hang`: the step does not end in the worker's first process."""
    seconds: float = 0.0
    """Seconds that the step takes in addition."""


NO_FAULT = StepFault("none")


def step_of(worker: str, step: int) -> str:
    """Return the key of a worker's step in `Behaviour.faults`."""
    return f"{worker} step {step}"


def worker_and_step(key: str) -> tuple[str, int]:
    """Return what `step_of` wrote."""
    worker, _, step = key.partition(" step ")
    return worker, int(step)


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """Seeded durations, and a table of faults."""

    seed: int = 0
    fastest_s: float = 0.05
    slowest_s: float = 0.3
    """Steps take between `fastest_s` and `slowest_s`."""
    slowest_evaluation_s: float = 2.0
    hang_s: float = 1e9
    """Duration of a step that hangs."""
    speeds: Mapping[str, float] = field(default_factory=dict)
    """Worker -> factor on all its durations, where it is not 1."""
    faults: Mapping[str, StepFault] = field(default_factory=dict)
    """Worker and step, as `step_of` writes them -> what goes wrong, each time that the step is made."""

    def fault(self, worker: str, step: int) -> StepFault:
        return self.faults.get(step_of(worker, step), NO_FAULT)

    def step_s(self, worker: str, step: int, process: int) -> float:
        """Return the duration of a step, in seconds.

        Args:
            process: number of processes that the worker has had before.
        """
        share = self._share(f"step {worker} {step} {process}")
        return self.speeds.get(worker, 1.0) * (self.fastest_s + share * (self.slowest_s - self.fastest_s))

    def evaluation_s(self, worker: str, number: int, process: int) -> float:
        """Return the duration of an evaluation, in seconds.

        Args:
            number: number of evaluations that the process has made before.
        """
        share = self._share(f"evaluation {worker} {number} {process}")
        return self.speeds.get(worker, 1.0) * share * self.slowest_evaluation_s

    def _share(self, of: str) -> float:
        """Return a number from 0 to 1 that looks random."""
        return crc32(f"{self.seed} {of}".encode()) / 2**32
