"""Schedules that fail: what is not needed for the failure is left out."""

from collections.abc import Callable
from dataclasses import replace

from tests.simulation.nodes import Timing
from tests.simulation.schedule import Schedule


def shrink(schedule: Schedule, fails: Callable[[Schedule], bool]) -> Schedule:
    """Return a schedule that still fails, without the disturbances that the failure does not need.

    Args:
        schedule: fails.
        fails: runs a schedule.
    """
    simplifications: tuple[Callable[[Schedule], Schedule], ...] = (
        lambda found: replace(found, timing=Timing()),
        lambda found: replace(found, behaviour=replace(found.behaviour, speeds={})),
        lambda found: replace(found, behaviour=replace(found.behaviour, faults=found.step_faults)),
    )
    for simplify in simplifications:
        simpler = simplify(schedule)
        if simpler != schedule and fails(simpler):
            schedule = simpler
    number = 0
    while number < schedule.disturbances:
        fewer = schedule.without(number)
        if fails(fewer):
            schedule = fewer
        else:
            number += 1
    return schedule
