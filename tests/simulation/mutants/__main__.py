"""Run the simulation on the code with each fault in it, and print which seeds find which fault.

    python -m tests.simulation.mutants [--seeds test|simulate] [--markdown] [NAME...]

The seeds and cases of `make test` come first. A fault that they do not find gets the schedules of `make simulate`,
unless `--seeds test` is given.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.simulation.mutants import Mutant, apply, load

ROOT = Path(__file__).parents[3]
STAGES = ("test", "simulate")
"""Names of the sets of seeds, in the order in which they are tried: those of `make test`, and of `make simulate`."""
TIMEOUT_S = 3600.0
"""Seconds after which a simulation that does not end counts as one that finds nothing."""
REPLAY = re.compile(r"tests\.simulation --(?P<what>seed \d+ --engine \w+|case \w+)")
"""What the simulation prints of a failure: what replays it."""
COLUMNS = ("number", "fault", "commit", "found by", "with", "seconds")


@dataclass(frozen=True)
class Found:
    """How the simulation found a fault."""

    stage: str
    replay: str
    """What the failure was found with: a seed and an engine, or a case."""
    seconds: float


def simulate(folder: Path, stage: str, engines: Sequence[str]) -> str | None:
    """Run the simulation in a folder up to its first failure; only this function knows its command line.

    Args:
        folder: root of a copy of the code.
        stage: the set of seeds.
        engines: the engines that are simulated.
    Returns:
        What replays the failure; None if there was no failure.
    Raises:
        RuntimeError: the simulation itself could not run.
    """
    command = [sys.executable, "-m", "tests.simulation", "--until-failure", "--seeds", stage, "--engines", *engines]
    try:
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return None
    if ran.returncode == 0:
        return None
    failure = REPLAY.search(ran.stdout)
    if failure is None:
        raise RuntimeError(f"{' '.join(command)} ended with status {ran.returncode}:\n{ran.stdout}\n{ran.stderr}")
    return failure["what"].replace(" --engine", "")


def find(mutant: Mutant, stages: Sequence[str]) -> Found | None:
    """Return how the simulation finds a fault; None if no set of seeds finds it."""
    with tempfile.TemporaryDirectory() as folder:
        apply(mutant, ROOT, Path(folder))
        for stage in stages:
            start = time.monotonic()
            failure = simulate(Path(folder), stage, mutant.engines)
            if failure is not None:
                return Found(stage, failure, time.monotonic() - start)
    return None


def cells(mutant: Mutant, found: Found | None) -> tuple[str, ...]:
    """Return a mutant's row of the table."""
    about = f"{mutant.number:02d}", mutant.title, mutant.commit or ""
    if found is None:
        return (*about, "NOT FOUND", "", "")
    return (*about, f"make {found.stage}", found.replay, f"{found.seconds:.1f}")


def totals(results: Sequence[tuple[Mutant, Found | None]]) -> str:
    """Return the last line of the table."""
    stages = [None if found is None else found.stage for _, found in results]
    undone = sum(mutant.commit is not None for mutant, _ in results)
    by_test, by_simulate, missed = (stages.count(stage) for stage in (*STAGES, None))
    return (
        f"{len(results)} faults, of which {undone} undo a fix: make test finds {by_test}, make simulate "
        f"{by_test + by_simulate}; {missed} not found."
    )


def rows(
    mutants: Sequence[Mutant], stages: Sequence[str], results: list[tuple[Mutant, Found | None]]
) -> Iterator[tuple[str, ...]]:
    """Yield the table's rows as they are known, and add what was found to `results`."""
    yield COLUMNS
    for mutant in mutants:
        results.append((mutant, find(mutant, stages)))
        yield cells(*results[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.mutants")
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to try; all of them by default")
    parser.add_argument("--seeds", choices=STAGES, default="simulate", help="the last set of seeds that is tried")
    parser.add_argument("--markdown", action="store_true", help="print the table for a page of the documentation")
    arguments = parser.parse_args()
    mutants = load()
    unknown = set(arguments.names) - {mutant.name for mutant in mutants}
    if unknown:
        parser.error(f"there are no faults {sorted(unknown)}; known are {[mutant.name for mutant in mutants]}")
    chosen = [mutant for mutant in mutants if not arguments.names or mutant.name in arguments.names]
    stages = STAGES[: STAGES.index(arguments.seeds) + 1]
    results: list[tuple[Mutant, Found | None]] = []
    for row in rows(chosen, stages, results):
        if arguments.markdown:
            print("| " + " | ".join(row) + " |", flush=True)
            if row == COLUMNS:
                print("|" + " --- |" * len(COLUMNS))
        else:
            number, title, commit, *found = row
            print(f"{number:<7}{commit:<9}{' '.join(filter(None, found)):<40}{title}", flush=True)
    print(("\n" if arguments.markdown else "") + totals(results))


if __name__ == "__main__":
    main()
