"""Simulated runs from the command line.

python -m tests.simulation --schedules 10000             many schedules over all engines, as `make simulate`
python -m tests.simulation --seed 17 --engine sync        one schedule, with its trace; a failure is shrunk
python -m tests.simulation --case NAME                    a schedule that once failed
"""

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice, product
from multiprocessing.connection import Connection, wait

import torch

from tests.simulation import cases
from tests.simulation.check import Result, check, check_case, check_seed
from tests.simulation.schedule import ENGINES, Schedule, make_schedule
from tests.simulation.shrink import shrink
from tests.simulation.trace import lines

TEST_SEEDS = {"async": 90, "bounded": 90, "sync": 90, "allreduce": 90, "local": 30}
"""Engine -> number of seeds that `make test` runs, beside the cases."""
SIMULATE_SCHEDULES = 10_000
Run = tuple[int, str] | str
"""A seed and an engine, or the name of a case."""
SHOWN = 10
"""Failures that are printed in full."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, help="replay the schedule of this seed")
    parser.add_argument("--engine", choices=ENGINES, default="async", help="engine of --seed")
    parser.add_argument("--case", choices=cases.names(), help="replay a schedule that once failed")
    parser.add_argument("--save", nargs=2, metavar=("NAME", "ABOUT"), help="keep a failing schedule as a case")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--seeds", choices=("test", "simulate"), help="what `make test` or `make simulate` runs")
    parser.add_argument("--schedules", type=int, help="number of schedules, spread over the engines")
    parser.add_argument("--until-failure", action="store_true", help="stop at the first failure")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    given = parser.parse_args(arguments)
    prepare_process()
    if given.case is not None:
        return replay(cases.load(given.case), None)
    if given.seed is not None:
        return replay(make_schedule(given.seed, given.engine), given.save)
    if given.seeds == "test":
        runs: list[Run] = [name for name in cases.names() if cases.load(name).engine in given.engines]
        runs += [(seed, engine) for engine in given.engines for seed in range(TEST_SEEDS[engine])]
    else:
        total = given.schedules or SIMULATE_SCHEDULES
        # Each engine gets the same seeds, whichever engines are chosen.
        seeds = -(-total // len(ENGINES))
        runs = list(islice(product(range(seeds), given.engines), total))
    return run_all(runs, given.processes, given.until_failure)


def replay(schedule: Schedule, save_as: Sequence[str] | None) -> int:
    """Run one schedule, and print what happens; return 1 if something is wrong with it."""
    story, wrong = check(schedule)
    if not wrong:
        print(*schedule.lines(), *(lines(story.trace) if story else ()), "Everything holds.", sep="\n")
        return 0
    kind = wrong[0][:40]
    smallest = shrink(schedule, lambda simpler: any(text[:40] == kind for text in check(simpler)[1]))
    story, wrong = check(smallest)
    print(*smallest.lines(), *(lines(story.trace) if story else ()), "", *wrong, sep="\n")
    if save_as is not None:
        print(f"Saved as {cases.save(*save_as, smallest)}.")
    return 1


def run_all(runs: Sequence[Run], processes: int, until_failure: bool) -> int:
    """Run many schedules, print the failures and a summary, and return 1 if there was a failure."""
    start, results = time.monotonic(), []
    for result in _results(runs, processes):
        results.append(result)
        if result.wrong:
            print(f"FAILED  python -m tests.simulation {result.replay}", flush=True)
            if sum(bool(other.wrong) for other in results) <= SHOWN:
                print(*(f"    {text}" for text in result.wrong[:SHOWN]), sep="\n", flush=True)
            if until_failure:
                break
    minutes = (time.monotonic() - start) / 60
    failures = sum(bool(result.wrong) for result in results)
    print(
        f"{len(results)} schedules, {failures} failures; {sum(result.kills for result in results)} processes killed, "
        f"{sum(result.messages for result in results)} messages, "
        f"{sum(result.seconds for result in results) / 3600:.1f} virtual hours; {minutes:.1f} minutes, "
        f"{len(results) / minutes / processes:.0f} schedules a minute and core"
    )
    return int(failures > 0)


def prepare_process() -> None:
    """Let this process use one core, and look for unreachable objects less often: that took a fourth of its time."""
    torch.set_num_threads(1)
    gc.set_threshold(50_000, 20, 50)


def _results(runs: Sequence[Run], processes: int) -> Iterator[Result]:
    """Yield what came of each run, in the order in which the processes have them."""
    if processes == 1:
        yield from map(_check_run, runs)
        return
    context = multiprocessing.get_context("fork")
    pipes: list[Connection] = []
    workers = []
    for first in range(processes):
        pipe, end = context.Pipe(duplex=False)
        workers.append(context.Process(target=_work, args=(runs[first::processes], end)))
        workers[-1].start()
        end.close()
        pipes.append(pipe)
    left = len(runs)
    try:
        while pipes:
            for ready in wait(pipes):
                assert isinstance(ready, Connection)
                try:
                    yield ready.recv()
                    left -= 1
                except EOFError:
                    pipes.remove(ready)
        if left:
            raise RuntimeError(f"A process of the simulation ended before its last run: {left} runs are missing.")
    finally:
        for worker in workers:
            worker.kill()  # which no schedule can take for the SIGTERM of a user


def _work(runs: Sequence[Run], pipe: Connection) -> None:
    """Do some runs in a process, which looks for unreachable objects between them, and among theirs only."""
    prepare_process()
    gc.freeze()
    gc.disable()
    for run in runs:
        pipe.send(_check_run(run))
        gc.collect()


def _check_run(run: Run) -> Result:
    return check_case(run) if isinstance(run, str) else check_seed(*run)


if __name__ == "__main__":
    sys.exit(main())
