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
    for simpler in (
        replace(schedule, timing=Timing()),
        replace(schedule, behaviour=replace(schedule.behaviour, speeds={})),
        replace(schedule, behaviour=replace(schedule.behaviour, faults=schedule.step_faults)),
    ):
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
