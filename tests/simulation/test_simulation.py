"""Simulated runs under all engines: fixed seeds, and every schedule that once failed.

`python -m tests.simulation --seed N --engine E` replays a schedule; `make simulate` runs ten thousand.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulation import cases
from tests.simulation.__main__ import TEST_SEEDS, prepare_process
from tests.simulation.check import check, check_seed
from tests.simulation.nodes import Timing
from tests.simulation.schedule import ENGINES, make_schedule
from tests.simulation.shrink import shrink
from tests.simulation.trace import lines

CHUNK = 30
CHUNKS = [(engine, first) for engine in ENGINES for first in range(0, TEST_SEEDS[engine], CHUNK)]
ORDERED = [(111, "bounded"), (119, "bounded"), (141, "sync"), (199, "sync")]
"""Schedules that once went another way in another process, because a set of texts has another order there."""


@pytest.fixture(autouse=True, scope="module")
def prepared_process() -> Iterator[None]:
    before = gc.get_threshold()
    prepare_process()
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize(("engine", "first"), CHUNKS)
def test_whatever_happens_to_a_run_every_invariant_holds(engine: str, first: int) -> None:
    for seed in range(first, first + CHUNK):
        result = check_seed(seed, engine)
        assert not result.wrong, f"python -m tests.simulation --seed {seed} --engine {engine}"


@pytest.mark.parametrize("name", cases.names())
def test_a_schedule_that_once_failed_holds(name: str) -> None:
    _, wrong = check(cases.load(name))
    assert not wrong, f"python -m tests.simulation --case {name}"


def traces() -> str:
    stories = [check(make_schedule(seed, engine))[0] for seed, engine in ORDERED]
    return "\n".join(line for story in stories if story is not None for line in lines(story.trace))


def test_another_process_repeats_a_run() -> None:
    code = f"from {__name__} import traces; print(traces())"
    root, environment = Path(__file__).parents[2], os.environ | {"PYTHONHASHSEED": "1"}
    repeated = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, check=True)
    assert repeated.stdout.decode() == f"{traces()}\n"


def test_what_a_failure_does_not_need_is_left_out() -> None:
    schedule = next(found for seed in range(100) if len((found := make_schedule(seed, "async")).faults) > 2)
    needed = schedule.faults[1]

    smallest = shrink(schedule, lambda simpler: needed in simpler.faults)

    assert smallest.faults == (needed,)
    assert smallest.disturbances == 1
    assert (smallest.timing, smallest.behaviour.speeds, smallest.behaviour.faults) == (Timing(), {}, {})
