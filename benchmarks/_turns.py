"""Ways to train that take turns on one machine: what a turn takes, and what other processes compute meanwhile.

Processor time and memory are read from /proc: Linux only.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple, Protocol

import ray

WARM_UP = 3
"""Steps at the start of each turn that are left out."""
TIMEOUT_S = 900
Actor = Any


class Mark(NamedTuple):
    """The end of one step of one worker."""

    at: float
    """Seconds of time.perf_counter."""
    blocked: float | None = None
    """Seconds since some start that the worker has waited for others; None where nobody can tell."""


class Variant(Protocol):
    """One way to train, with its processes."""

    actors: list[Actor]
    """All of them, for their memory and to end them."""

    def turn(self, steps: int) -> list[list[Mark]]:
        """Train for some steps of each worker, and leave nothing running; every worker's marks, one for each step."""


Turn = dict[str, float]
Turns = dict[str, list[Turn]]
"""Variant -> what was measured in each round."""


def take_turns(makers: Mapping[str, Callable[[], Variant]], *, rounds: int, steps: int, images_per_step: int) -> Turns:
    """Let every variant train for some steps in every round.

    Each is started for its turn and ended after it. All of them at once would need the memory of all, and a waiting
    actor is not idle: Ray's threads were measured to take 0.01 core in each, 0.2 cores with all rows alive.

    Args:
        steps: of each worker in each turn, beyond the warm-up.
    """
    turns: Turns = {name: [] for name in makers}
    for number in range(rounds):
        # Another order in each round: a neighbour's load that comes and goes meets all variants alike.
        names = list(makers)
        names = names[number % len(names) :] + names[: number % len(names)]
        for name in reversed(names) if number % 2 else names:
            with started(makers[name]) as variant:
                turns[name].append(take_turn(variant, steps, images_per_step))
        print(f"Round {number + 1} of {rounds}: {outside_load(turns, number):.2f} cores used by others", flush=True)
    return turns


@contextlib.contextmanager
def started(make: Callable[[], Variant]) -> Iterator[Variant]:
    """A variant that is ready for its turn; ended with the block."""
    variant = make()
    try:
        ray.get([actor.__ray_ready__.remote() for actor in variant.actors], timeout=TIMEOUT_S)
        yield variant
    finally:
        for actor in variant.actors:
            ray.kill(actor)


def take_turn(variant: Variant, steps: int, images_per_step: int) -> Turn:
    start, before = time.perf_counter(), ProcessorTime.now()
    marks = variant.turn(WARM_UP + steps)
    span, own, others = time.perf_counter() - start, *ProcessorTime.now().since(before)
    # From the end of the last step left out on.
    measured = [times[WARM_UP - 1 :] for times in marks]
    pairs = [pair for times in measured for pair in pairwise(times)]
    waits = [
        after.blocked - before.blocked
        for before, after in pairs
        if before.blocked is not None and after.blocked is not None
    ]
    return {
        "images/s": sum(images_per_step * (len(times) - 1) / (times[-1].at - times[0].at) for times in measured),
        "step ms": 1000 * median(after.at - before.at for before, after in pairs),
        **({"blocked ms": 1000 * median(waits)} if waits else {}),
        # The steps left out above count here, as does the time of server and driver.
        "cpu ms": 1000 * own / sum(len(times) for times in marks),
        "memory MB": memory_bytes(variant.actors) / 1e6,
        "others' cores": others / span,
    }


def outside_load(turns: Turns, number: int) -> float:
    """Cores that other processes used in a round, in the mean over its turns."""
    return mean(taken[number]["others' cores"] for taken in turns.values())


class ProcessorTime(NamedTuple):
    """Processor seconds so far, as Linux counts them."""

    machine: float
    """Of all processes, and what the host of a virtual machine took away."""
    own: dict[int, float]
    """Of this process and its offspring, which are Ray's processes and all actors, each for itself."""

    @classmethod
    def now(cls) -> "ProcessorTime":
        tick = os.sysconf("SC_CLK_TCK")
        first_line = Path("/proc/stat").read_text().splitlines()[0]
        user, nice, system, _, _, interrupt, soft_interrupt, stolen, *_ = map(int, first_line.split()[1:])
        parents, spent = {}, {}
        for file in Path("/proc").glob("[0-9]*/stat"):
            # A process may end between the listing and the reading.
            with contextlib.suppress(OSError):
                # The second field, a name in brackets, may hold blanks.
                fields = file.read_text().rpartition(")")[2].split()
                parents[int(file.parent.name)] = int(fields[1])
                spent[int(file.parent.name)] = (int(fields[11]) + int(fields[12])) / tick
        machine = (user + nice + system + interrupt + soft_interrupt + stolen) / tick
        return cls(machine, {process: spent[process] for process in offspring(os.getpid(), parents)})

    def since(self, before: "ProcessorTime") -> tuple[float, float]:
        """Seconds of this process and its offspring, and of all others; who ended meanwhile counts as another."""
        own = sum(seconds - before.own.get(process, 0.0) for process, seconds in self.own.items())
        # The machine's count and the processes' are not read at one moment.
        return own, max(0.0, self.machine - before.machine - own)


def offspring(process: int, parents: Mapping[int, int]) -> set[int]:
    """A process, its children and theirs, from process -> parent."""
    found, new = set[int](), {process}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in new}
    return found


def memory_bytes(actors: Sequence[Actor]) -> int:
    """Resident bytes; a page that several processes hold counts by its share."""
    return sum(ray.get([actor.__ray_call__.remote(_own_memory) for actor in actors], timeout=TIMEOUT_S))


def _own_memory(_: Any) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return 1024 * int(lines["Pss"].split()[0])
