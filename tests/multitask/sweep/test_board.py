"""The live table: counts, order, and the time that is left."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from multitask.spec.schema import JobSpec
from multitask.sweep.board import Board, Line, Standing
from multitask.sweep.outcomes import TrialOutcome
from multitask.sweep.plan import TrialPlan
from tests.multitask.test_progress import Clock

KEYS = ("optimizer.rate",)


@pytest.fixture
def plans(make_spec: Callable[..., JobSpec], tmp_path: Path) -> list[TrialPlan]:
    spec = make_spec(steps=100)
    specs = [replace(spec, name=f"s_{n}", directory=str(tmp_path / f"{n}")) for n in range(4)]
    return [TrialPlan(n, n, {"optimizer.rate": 0.1 * n}, spec) for n, spec in enumerate(specs)]


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


def test_rounds_that_go_on_beyond_the_steps_are_not_shown(plans: list[TrialPlan]) -> None:
    """Under `async`, the workers that are left at the end count as whole rounds."""
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(Standing(KEYS, 1, {0: Line(plans[0], "running", 107, 40.0)}).table("rates", 0.0))
    assert "100/100" in (text := console.export_text())
    assert "107" not in text


def test_a_pipe_gets_a_line_about_the_trials_every_half_minute(plans: list[TrialPlan]) -> None:
    file, clock = io.StringIO(), Clock()
    outcomes = [TrialOutcome(plan=plan, state="waiting") for plan in plans[:3]]
    about: dict[str, Any] = {"iteration": 0, "trials": []}
    with Board("rates [x]", KEYS, 4, outcomes, Console(file=file), clock) as board:
        board.on_trial_start(trial=Trial(plans[1]), **about)
        clock.now += 29
        board.on_step_end(**about)
        assert file.getvalue() == ""
        clock.now += 1
        board.on_step_end(**about)
        board.on_trial_result(trial=Trial(plans[1]), result={"round": 50, "validation_top1": 81.25}, **about)
        board.on_trial_complete(trial=Trial(plans[1]), **about)
        clock.now += 30
        board.on_step_end(**about)
    # 50 rounds took 60 s, and three trials of 100 are left.
    assert file.getvalue().splitlines() == [
        "rates [x]: 4 trials, 1 running, 3 waiting",
        "rates [x]: 4 trials, 1 stopped, 3 waiting; about 6 min left; "
        "best so far: trial 1 with 81.2 % validation top-1",
    ]


class Trial:
    def __init__(self, plan: TrialPlan) -> None:
        self.config = {"plan": plan}


def test_what_tune_tells_moves_the_trials_on(plans: list[TrialPlan]) -> None:
    # The other trials are suggested while the sweep runs.
    board = Board("rates", KEYS, 4, [TrialOutcome(plan=plans[0], state="waiting")], Console(quiet=True))
    about: dict[str, Any] = {"iteration": 0, "trials": []}

    for plan in plans[:3]:
        board.on_trial_start(trial=Trial(plan), **about)
    # It ended by itself, at round 60 of 100.
    board.on_trial_result(trial=Trial(plans[0]), result={"round": 60, "validation_top1": 70.0}, **about)
    plans[0].directory.mkdir()
    (plans[0].directory / "result.json").touch()
    board.on_trial_complete(trial=Trial(plans[0]), **about)
    board.on_trial_result(trial=Trial(plans[1]), result={"round": 50, "validation_top1": 20.0}, **about)
    board.on_trial_complete(trial=Trial(plans[1]), **about)
    board.on_trial_error(trial=Trial(plans[2]), **about)

    assert [line.state for line in board.standing.lines.values()] == ["finished", "stopped", "failed"]
    assert board.ended == {0, 1, 2}
