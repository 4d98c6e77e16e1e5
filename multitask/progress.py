"""Progress for people: a bar on a terminal, and a line every half minute where nobody looks at a terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 30.0
"""Shortest time between two lines about the same work."""

Clock = Callable[[], float]
"""Returns seconds, and never runs backwards."""
OnRows = Callable[[int, int], None]
"""Takes the number of rows that are done, and the number of all rows."""


class Speed:
    """The mean speed of some work since it was first seen."""

    def __init__(self, done: int, now: float) -> None:
        """Args:
        done: units of work that are done already.
        now: the present time in seconds.
        """
        self._done, self._since = done, now

    def per_s(self, done: int, now: float) -> float:
        """Return the number of units that were done in a second; 0 while there is nothing to tell it from."""
        return max(0, done - self._done) / (now - self._since) if now > self._since else 0.0

    def left(self, done: int, total: int, now: float) -> str:
        """Return in words how long the rest takes, with a comma before them; empty where nothing tells or is left."""
        speed = self.per_s(done, now)
        return f", {duration((total - done) / speed)} left" if speed and total > done else ""


class Pace:
    """Says every half minute that a line is due."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = clock()

    def due(self) -> float | None:
        """Return the seconds since a line was last due, or since the start, if one is due now; None if none is."""
        now = self._clock()
        seconds = now - self._last
        if seconds < LINE_EVERY_S:
            return None
        self._last = now
        return seconds


class RowLines:
    """Prints how many rows are done, once in half a minute."""

    def __init__(self, what: str, console: Console, clock: Clock) -> None:
        self._what, self._console, self._clock = what, console, clock
        self._pace = Pace(clock)
        self._speed: Speed | None = None

    def tell(self, done: int, total: int) -> None:
        """Take in how many rows are done, and print it if that is due."""
        now = self._clock()
        if self._speed is None:  # an import may go on where an earlier one ended
            self._speed = Speed(done, now)
        if self._pace.due():
            speed = self._speed.per_s(done, now)
            rest = f", {speed:,.0f} images/s{self._speed.left(done, total, now)}" if speed else ""
            self._console.out(f"{self._what}: {done:,} of {total:,} images{rest}", highlight=False)


@contextmanager
def showing_rows(what: str, console: Console | None = None, clock: Clock = time.monotonic) -> Iterator[OnRows]:
    """Show how many rows of images are done while the block runs, and nothing on standard output.

    Args:
        what: name of the work.
        console: where it is shown; standard error by default.
        clock: the time, for the lines.
    Yields:
        The function to call again and again.
    """
    console = console or Console(stderr=True)
    if not console.is_interactive:
        yield RowLines(what, console, clock).tell
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)


def duration(seconds: float) -> str:
    """Return a time as people say it: `45 s`, `12 min`, `3 h 20 min`, and whole hours from 100 on."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 6000 else f"{round(seconds / 3600):,} h"
