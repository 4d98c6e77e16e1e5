import math
from itertools import pairwise

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


@given(st.data(), st.floats(1e-6, 10), st.integers(2, 2000))
def test_a_warm_up_rises_in_a_line_and_the_cosine_falls_from_where_it_ends(
    data: st.DataObject, rate: float, rounds: int
) -> None:
    warm_up = data.draw(st.integers(1, rounds - 1), "warm_up_rounds")
    schedule = cosine(rate, rounds=rounds, warm_up_rounds=warm_up)
    rates = [schedule(done) for done in range(rounds + 2)]

    assert rates[0] == rates[rounds] == rates[rounds + 1] == 0
    assert rates[warm_up] == rate == max(rates)
    # The rate is continuous: the last step of the line is as high as every other step.
    rises = [after - before for before, after in pairwise(rates[: warm_up + 1])]
    assert rises == pytest.approx([rate / warm_up] * warm_up, rel=1e-6)
    falling = rates[warm_up:]
    assert falling == sorted(falling, reverse=True)
    assert falling == [cosine(rate, rounds=rounds - warm_up)(done) for done in range(len(falling))]


@given(
    sizes=st.lists(st.integers(100, 2_000_000), min_size=2, max_size=5),
    batch_size=st.integers(1, 256),
    decays=st.integers(1, 5),
)
def test_tasks_of_all_sizes_decay_together_when_images_per_decay_are_equal(
    sizes: list[int], batch_size: int, decays: int
) -> None:
    """2.5 epochs of ImageNet are fewer epochs of a larger data set, but the same number of rounds."""
    images_per_decay = 2.5 * sizes[0]
    every_rounds = max(1, round(images_per_decay / batch_size))
    schedule = exponential(0.045, factor=0.98, every_rounds=every_rounds)

    for size in sizes:
        epochs_per_decay = images_per_decay / size
        rounds_per_epoch = size / batch_size
        # `every_rounds` is rounded, which adds at most one round per decay.
        done = math.ceil(decays * epochs_per_decay * rounds_per_epoch) + decays
        assert schedule(done) <= 0.045 * 0.98**decays * (1 + 1e-12)
        assert schedule(decays * every_rounds - 1) > 0.045 * 0.98**decays * (1 + 1e-12)
