"""Ways to train that take turns on one machine: how long a turn takes, and how much other processes compute meanwhile.

Processor time and memory are read from /proc: Linux only.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import harmonic_mean, mean, median
from typing import Any, NamedTuple, Protocol

import ray

WARM_UP = 3
"""Steps of a variant after its start that are not counted."""
LAPS = 4
"""Turns of a variant, and of the base beside it, in each round."""
TIMEOUT_S = 900
Actor = Any


class Mark(NamedTuple):
    """The end of one step of one worker."""

    at: float
    """Seconds of time.perf_counter."""
    blocked: float | None = None
    """Total seconds for which the worker has waited for others; None if they are not measured."""


class Variant(Protocol):
    """One way to train, with its processes."""

    actors: list[Actor]
    """All actors, to measure their memory and to end them."""

    def turn(self, steps: int) -> list[list[Mark]]:
        """Let each worker make some steps and leave nothing running. Return every worker's marks, one for each step."""


Turn = dict[str, float]
Turns = dict[str, list[Turn]]
"""Variant -> what was measured in each round."""


def take_turns(
    makers: Mapping[str, Callable[[], Variant]], base: str, *, rounds: int, steps: int, images_per_step: int
) -> Turns:
    """Compare every variant with the base in every round.

    A machine of this kind is 20 % faster or slower from one ten seconds to the next, so a variant and the base take
    short turns, `LAPS` each. No third one is alive meanwhile: all at once would need the memory of all, and a waiting
    actor is not idle: Ray's threads were measured to take 0.01 core in each.

    Args:
        steps: of each worker in each turn, beyond the first one, in which the workers come together.
    Returns:
        Variant -> its rounds, each with its `ratio`: images/s to those of the base between its turns. The base itself
        has a round for every comparison.
    """
    turns: Turns = {name: [] for name in makers}
    for number in range(rounds):
        # The order changes with each round, so that a load from outside that comes and goes meets all variants alike.
        names = [name for name in makers if name != base]
        names = names[number % len(names) :] + names[: number % len(names)]
        with started(makers[base]) as reference:
            reference.turn(WARM_UP)
            for name in reversed(names) if number % 2 else names:
                with started(makers[name]) as variant:
                    compared = compare(reference, variant, steps, images_per_step)
                for row, turn in zip((base, name), compared, strict=True):
                    turns[row].append(turn)
        print(f"Round {number + 1} of {rounds}: {outside_load(turns):.2f} cores used by others so far", flush=True)
    return turns


def compare(base: Variant, variant: Variant, steps: int, images_per_step: int) -> tuple[Turn, Turn]:
    """Return what both did in alternating turns, the base first."""
    laps: tuple[list[Turn], list[Turn]] = [], []
    variant.turn(WARM_UP)
    for lap in range(LAPS):
        pairs = list(zip(laps, (base, variant), strict=True))
        for found, which in reversed(pairs) if lap % 2 else pairs:
            found.append(take_turn(which, steps, images_per_step))
    of_base, own = ({key: mean(turn[key] for turn in found) for key in found[0]} for found in laps)
    # Images of all turns, divided by the time of all turns.
    of_base["images/s"], own["images/s"] = (harmonic_mean([turn["images/s"] for turn in found]) for found in laps)
    return of_base | {"ratio": 1.0}, own | {"ratio": own["images/s"] / of_base["images/s"]}


@contextlib.contextmanager
def started(make: Callable[[], Variant]) -> Iterator[Variant]:
    """Start a variant for its turn, and end it with the block."""
    variant = make()
    try:
        ray.get([actor.__ray_ready__.remote() for actor in variant.actors], timeout=TIMEOUT_S)
        yield variant
    finally:
        for actor in variant.actors:
            ray.kill(actor)


def take_turn(variant: Variant, steps: int, images_per_step: int) -> Turn:
    start, before = time.perf_counter(), ProcessorTime.now()
    marks = variant.turn(1 + steps)
    span, own, others = time.perf_counter() - start, *ProcessorTime.now().since(before)
    pairs = [pair for times in marks for pair in pairwise(times)]
    waits = [
        after.blocked - before.blocked
        for before, after in pairs
        if before.blocked is not None and after.blocked is not None
    ]
    return {
        "images/s": sum(images_per_step * steps / (times[-1].at - times[0].at) for times in marks),
        "step ms": 1000 * median(after.at - before.at for before, after in pairs),
        **({"blocked ms": 1000 * median(waits)} if waits else {}),
        # The first steps count here, as does the time of server and driver.
        "cpu ms": 1000 * own / sum(len(times) for times in marks),
        "memory MB": memory_bytes(variant.actors) / 1e6,
        "others' cores": others / span,
    }


def outside_load(turns: Turns) -> float:
    """Return the mean number of cores that other processes used, over all turns."""
    return mean(turn["others' cores"] for taken in turns.values() for turn in taken)


class ProcessorTime(NamedTuple):
    """Processor seconds so far, as Linux counts them."""

    machine: float
    """Seconds of all processes, and those that the host took away from this virtual machine."""
    own: dict[int, float]
    """Process -> its seconds, for this process and its descendants: Ray's processes and all actors."""

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
        """Return the seconds of this process with its descendants, and of all others with ended descendants."""
        own = sum(seconds - before.own.get(process, 0.0) for process, seconds in self.own.items())
        # The machine's seconds and the processes' are read at slightly different moments.
        return own, max(0.0, self.machine - before.machine - own)


def offspring(process: int, parents: Mapping[int, int]) -> set[int]:
    """Return a process and all its descendants, from a mapping of process -> parent."""
    found, new = set[int](), {process}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in new}
    return found


def memory_bytes(actors: Sequence[Actor]) -> int:
    """Return resident bytes, where each of n processes that share a page counts 1/n of it."""
    return sum(ray.get([actor.__ray_call__.remote(_own_memory) for actor in actors], timeout=TIMEOUT_S))


def _own_memory(_: Any) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return 1024 * int(lines["Pss"].split()[0])
