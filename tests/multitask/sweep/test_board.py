"""The live table: counts, order, and the time that is left."""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from multitask.spec.schema import JobSpec
from multitask.sweep.board import Board, Line, Standing, duration
from multitask.sweep.outcomes import TrialOutcome
from multitask.sweep.plan import TrialPlan

KEYS = ("optimizer.rate",)


@pytest.fixture
def plans(make_spec: Callable[..., JobSpec]) -> list[TrialPlan]:
    spec = make_spec(steps=100)
    return [TrialPlan(n, n, {"optimizer.rate": 0.1 * n}, replace(spec, name=f"s_{n}")) for n in range(4)]


def test_time_left_follows_todays_speed(plans: list[TrialPlan]) -> None:
    standing = Standing(KEYS, 4, {plan.number: Line(plan) for plan in plans}, began=1000.0)
    standing.lines[0] = Line(plans[0], "finished", 100, 80.0)  # finished in an earlier start
    assert standing.seconds_left(1000.0) is None

    standing.note(1, 50, 60.0)

    # 50 steps were made in 10 s, and 50 + 100 + 100 are left.
    assert standing.seconds_left(1010.0) == pytest.approx(50.0)
    standing.lines[2].state = "failed"
    assert standing.seconds_left(1010.0) == pytest.approx(30.0)
    # Two more trials, which the searcher has yet to suggest.
    standing.trials = 6
    assert standing.seconds_left(1010.0) == pytest.approx(70.0)


def test_an_evaluation_that_is_told_again_is_no_work(plans: list[TrialPlan]) -> None:
    standing = Standing(KEYS, 1, {0: Line(plans[0], "waiting", 50, 70.0)})

    standing.note(0, 25, 60.0)
    standing.note(0, 50, 70.0)

    assert standing.steps_made == 0
    assert standing.lines[0].top1 == 70.0


def test_running_trials_stand_above_the_best_of_the_others(plans: list[TrialPlan]) -> None:
    lines = {
        0: Line(plans[0], "finished", 100, 60.0),
        1: Line(plans[1], "finished", 100, 90.0),
        2: Line(plans[2], "running", 50, 40.0),
    }
    console = Console(record=True, width=120, file=io.StringIO())

    console.print(Standing(KEYS, 4, lines).table("rates", 0.0))

    text = console.export_text()
    assert "rates: 4 trials, 2 finished, 1 running, 1 waiting" in text
    assert text.index("40.00") < text.index("90.00") < text.index("60.00")


def test_a_narrow_terminal_cuts_nothing(plans: list[TrialPlan]) -> None:
    values = {"tasks.method": "scale_bias+last_layer", "optimizer.rate": 0.0001234, "tasks.augment": "crop_flip"}
    plan = replace(plans[0], number=9_999, values=values, spec=replace(plans[0].spec, steps=1_000_000))
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(Standing(list(values), 1, {0: Line(plan, "finished", 1_000_000, 98.76)}).table("[x]", 0.0))
    text = console.export_text()
    named = ("method=scale_bias+last_layer,", "rate=0.0001234,", "augment=crop_flip")
    assert all(whole in text for whole in (*named, "9999", "1000000/1000000", "98.76", "[x]: 1 trials"))
    assert "…" not in text


class Trial:
    def __init__(self, plan: TrialPlan) -> None:
        self.config = {"plan": plan}


def test_what_tune_tells_moves_the_trials_on(plans: list[TrialPlan]) -> None:
    # The other trials are suggested while the sweep runs.
    board = Board("rates", KEYS, 4, [TrialOutcome(plan=plans[0], state="waiting")], Console(quiet=True))
    about: dict[str, Any] = {"iteration": 0, "trials": []}

    for plan in plans[:3]:
        board.on_trial_start(trial=Trial(plan), **about)
    board.on_trial_result(trial=Trial(plans[0]), result={"round": 100, "validation_top1": 70.0}, **about)
    board.on_trial_complete(trial=Trial(plans[0]), **about)
    board.on_trial_result(trial=Trial(plans[1]), result={"round": 50, "validation_top1": 20.0}, **about)
    board.on_trial_complete(trial=Trial(plans[1]), **about)
    board.on_trial_error(trial=Trial(plans[2]), **about)

    assert [line.state for line in board.standing.lines.values()] == ["finished", "stopped", "failed"]
    assert board.ended == {0, 1, 2}


def test_durations_are_for_people() -> None:
    assert [duration(seconds) for seconds in (45, 720, 12_000)] == ["45 s", "12 min", "3 h 20 min"]
