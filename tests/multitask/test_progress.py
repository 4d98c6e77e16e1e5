"""Progress of long work: a bar on a terminal, and a line every half minute elsewhere."""

import io
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from multitask.progress import LINE_EVERY_S, Pace, Speed, duration, showing_rows


class Clock:
    """A clock that tests move."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def terminal(file: io.StringIO, width: int = 80) -> Console:
    return Console(file=file, force_terminal=True, width=width, legacy_windows=False, _environ={"TERM": "xterm"})


@pytest.fixture
def piped() -> tuple[Console, Callable[[], list[str]]]:
    """A console that is no terminal, and the lines in it."""
    file = io.StringIO()
    return Console(file=file), lambda: file.getvalue().splitlines()


def test_durations_are_for_people() -> None:
    seconds = (0.4, 45, 720, 12_000, 359_990, 1_523_000, 5_400_000)
    shown = ["0 s", "45 s", "12 min", "3 h 20 min", "100 h", "423 h", "1,500 h"]
    assert [duration(one) for one in seconds] == shown


def test_the_time_left_follows_the_work_since_it_was_first_seen() -> None:
    speed = Speed(100, now=50.0)
    assert speed.left(100, 400, 50.0) == speed.left(100, 400, 80.0) == ""
    assert speed.per_s(160, 80.0) == 2.0  # 60 in 30 s
    assert speed.left(160, 400, 80.0) == ", 2 min left"
    assert speed.left(400, 400, 90.0) == ""
    assert speed.left(90, 400, 90.0) == ""  # the work went back to before it was seen


@given(st.lists(st.floats(0.01, 100), max_size=40))
def test_a_line_is_due_at_most_once_in_half_a_minute(waits: list[float]) -> None:
    clock = Clock()
    pace, told = Pace(clock), [clock.now]
    for wait in waits:
        clock.now += wait
        seconds = pace.due()
        assert (seconds is not None) == (clock.now - told[-1] >= LINE_EVERY_S)
        if seconds is not None:
            assert seconds == pytest.approx(clock.now - told[-1])
            told.append(clock.now)


def test_a_pipe_gets_a_line_every_half_minute(
    piped: tuple[Console, Callable[[], list[str]]], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    console, lines = piped
    with showing_rows("importing [pets]", console, clock) as on_rows:
        for done in range(10_000, 50_000, 4_000):  # 10,000 were imported by an earlier start
            on_rows(done, 1_000_000)
            clock.now += 8

    assert lines() == [
        # 16,000 more after 32 s.
        "importing [pets]: 26,000 of 1,000,000 images, 500 images/s, 32 min left",
        "importing [pets]: 42,000 of 1,000,000 images, 500 images/s, 32 min left",
    ]
    assert capsys.readouterr().out == ""


def test_short_work_prints_no_line(piped: tuple[Console, Callable[[], list[str]]], clock: Clock) -> None:
    console, lines = piped
    with showing_rows("evaluating", console, clock) as on_rows:
        on_rows(0, 10)
        clock.now += LINE_EVERY_S - 1
        on_rows(10, 10)
    assert lines() == []


def test_a_terminal_gets_a_bar_to_the_end() -> None:
    file = io.StringIO()
    with showing_rows("evaluating [pets]", terminal(file)) as on_rows:
        on_rows(3, 8)
        on_rows(8, 8)
    shown = file.getvalue()
    assert "evaluating [pets]" in shown
    assert "8/8" in shown
    assert "…" not in shown
