import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multitask.server.schedules import constant, cosine, exponential


def test_exponential_decays_in_steps() -> None:
    schedule = exponential(0.045, factor=0.98, every_rounds=10)

    assert [schedule(done) for done in (0, 9, 10, 19, 20)] == pytest.approx(
        [0.045, 0.045, 0.045 * 0.98, 0.045 * 0.98, 0.045 * 0.98**2]
    )


def test_cosine_ends_at_zero_and_stays_there() -> None:
    schedule = cosine(0.5, rounds=100)

    assert schedule(0) == 0.5
    assert schedule(50) == pytest.approx(0.25)
    assert schedule(25) == pytest.approx(0.25 * (1 + math.cos(math.pi / 4)))
    assert schedule(100) == schedule(130) == 0


@given(rate=st.floats(1e-6, 10), done=st.integers(0, 5000), rounds=st.integers(1, 1000))
def test_rates_never_rise_or_leave_their_range(rate: float, done: int, rounds: int) -> None:
    for schedule in (constant(rate), exponential(rate, factor=0.9, every_rounds=rounds), cosine(rate, rounds=rounds)):
        assert 0 <= schedule(done + 1) <= schedule(done) <= rate
