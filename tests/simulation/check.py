"""Running many schedules, and what is found."""

import contextlib
import logging
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from tests.simulation import cases
from tests.simulation.invariants import complaints
from tests.simulation.run import Story, simulate
from tests.simulation.schedule import Schedule, make_schedule

WATCHDOG_S = 60
"""Real seconds after which a schedule that has not ended fails: code that never gives the world a turn."""


@dataclass(frozen=True)
class Result:
    """What a schedule's run showed."""

    replay: str
    """Arguments of `python -m tests.simulation` that run the schedule again."""
    wrong: tuple[str, ...]
    seconds: float
    """Virtual seconds."""
    messages: int
    kills: int


class TooSlowError(Exception):
    """A schedule took too long."""


def check_seed(seed: int, engine: str) -> Result:
    """Run the schedule of a seed under an engine."""
    return _result(f"--seed {seed} --engine {engine}", make_schedule(seed, engine))


def check_case(name: str) -> Result:
    """Run a schedule that once failed."""
    return _result(f"--case {name}", cases.load(name))


def _result(replay: str, schedule: Schedule) -> Result:
    story, wrong = check(schedule)
    if story is None:
        return Result(replay, tuple(wrong), 0.0, 0, 0)
    return Result(replay, tuple(wrong), story.seconds, story.messages, story.kills)


def check(schedule: Schedule) -> tuple[Story | None, list[str]]:
    """Run a schedule.

    Returns:
        What happened (None if the simulation itself failed), and what is wrong with it, in words.
    """
    story = None
    try:
        with _watchdog(), _quiet():
            story = simulate(schedule)
            return story, complaints(story)
    except Exception:
        return story, [f"The simulation failed: {traceback.format_exc()}"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the package's warnings from the terminal: thousands of runs lose processes."""
    package, nowhere = logging.getLogger("multitask"), logging.NullHandler()
    package.addHandler(nowhere)
    try:
        yield
    finally:
        package.removeHandler(nowhere)


@contextlib.contextmanager
def _watchdog() -> Iterator[None]:
    def too_slow(_number: int, _frame: FrameType | None) -> None:
        raise TooSlowError(f"The schedule did not end within {WATCHDOG_S} s.")

    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(WATCHDOG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
