"""The history of the training loss stays short, and its means are right."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multitask.run.losses import MOST_POINTS, Loss, add_loss


@given(st.integers(1, 3000), st.integers(1, 7))
def test_a_history_of_any_length_keeps_every_step_in_few_points(steps: int, workers: int) -> None:
    """Each of several workers of a task makes a step in a round; the loss of step i is i."""
    losses: list[Loss] = []
    for step in range(steps):
        add_loss(losses, step // workers, float(step))

    assert len(losses) <= MOST_POINTS
    assert steps < 2 * MOST_POINTS or len(losses) > MOST_POINTS // 2 - 1
    assert {many for _, _, many in losses[:-1]} <= {losses[0][2]}
    first = 0
    for round_, loss, many in losses:
        assert loss == pytest.approx(first + (many - 1) / 2)
        first += many
        assert round_ == (first - 1) // workers
    assert first == steps


def test_rounds_that_are_made_again_replace_those_that_were_lost() -> None:
    losses: list[Loss] = []
    for round_ in (0, 1, 2, 3, 2, 3, 4):
        add_loss(losses, round_, 10.0 * len(losses))

    # Round 2 stays, because another worker of the task may have made a step in it that was not lost.
    assert [round_ for round_, _, _ in losses] == [0, 1, 2, 2, 3, 4]


def test_a_loss_that_is_not_finite_is_left_out() -> None:
    losses: list[Loss] = []
    for loss in (1.0, math.nan, math.inf, 3.0):
        add_loss(losses, 0, loss)

    assert losses == [(0, 1.0, 1), (0, 3.0, 1)]
