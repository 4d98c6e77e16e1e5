"""Simulated runs under all engines: fixed seeds, and every schedule that once failed.

`python -m tests.simulation --seed N --engine E` replays a schedule; `make simulate` runs ten thousand.
"""

import pytest

from tests.simulation import cases
from tests.simulation.__main__ import TEST_SEEDS
from tests.simulation.check import check, check_seed
from tests.simulation.nodes import Timing
from tests.simulation.schedule import ENGINES, make_schedule
from tests.simulation.shrink import shrink

CHUNK = 30
CHUNKS = [(engine, first) for engine in ENGINES for first in range(0, TEST_SEEDS[engine], CHUNK)]


@pytest.mark.parametrize(("engine", "first"), CHUNKS)
def test_whatever_happens_to_a_run_every_invariant_holds(engine: str, first: int) -> None:
    for seed in range(first, first + CHUNK):
        result = check_seed(seed, engine)
        assert not result.wrong, f"python -m tests.simulation --seed {seed} --engine {engine}"


@pytest.mark.parametrize("name", cases.names())
def test_a_schedule_that_once_failed_holds(name: str) -> None:
    _, wrong = check(cases.load(name))
    assert not wrong, f"python -m tests.simulation --case {name}"


def test_a_schedule_is_the_same_each_time() -> None:
    schedule = make_schedule(5, "async")
    first, second = (check(schedule)[0] for _ in range(2))
    assert first is not None
    assert second is not None
    assert [str(line[:2]) for line in first.trace] == [str(line[:2]) for line in second.trace]


def test_what_a_failure_does_not_need_is_left_out() -> None:
    schedule = next(found for seed in range(100) if len((found := make_schedule(seed, "async")).faults) > 2)
    needed = schedule.faults[1]

    smallest = shrink(schedule, lambda simpler: needed in simpler.faults)

    assert smallest.faults == (needed,)
    assert smallest.disturbances == 1
    assert (smallest.timing, smallest.behaviour.speeds, smallest.behaviour.faults) == (Timing(), {}, {})
