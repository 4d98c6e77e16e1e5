from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from multitask.data.order import EpochOrder

groups = st.lists(st.integers(1, 9), min_size=1, max_size=12).map(lambda rows: np.array(rows, dtype=np.int64))


def stream(order: EpochOrder, group_rows: np.ndarray, epoch: int) -> list[int]:
    """Table rows of one worker's epoch, in order."""
    starts = np.concatenate([[0], np.cumsum(group_rows)])
    rows: list[int] = []
    place = order.place(epoch * order.rows_per_epoch)[:2]
    while place[0] == epoch:
        window = order.window(*place)
        held = [int(starts[span.group]) + row for span in window.spans for row in range(span.start, span.stop)]
        rows += [held[i] for i in window.order]
        place = order.following(*place)
    return rows


@given(group_rows=groups, workers=st.integers(1, 6), window=st.integers(1, 30), seed=st.integers(0, 2**40))
def test_each_epoch_has_every_row_once_in_shares_equal_but_for_one(
    group_rows: np.ndarray, workers: int, window: int, seed: int
) -> None:
    workers = min(workers, int(group_rows.sum()))
    orders = [EpochOrder(group_rows, seed=seed, rank=rank, workers=workers, window=window) for rank in range(workers)]
    assert max(o.rows_per_epoch for o in orders) - min(o.rows_per_epoch for o in orders) <= 1
    for epoch in (0, 1, 7):
        shares = [stream(order, group_rows, epoch) for order in orders]
        assert [len(share) for share in shares] == [order.rows_per_epoch for order in orders]
        assert Counter(row for share in shares for row in share) == Counter(range(int(group_rows.sum())))


@given(group_rows=groups, window=st.integers(1, 30), position=st.integers(0, 500))
def test_every_position_has_its_place(group_rows: np.ndarray, window: int, position: int) -> None:
    order = EpochOrder(group_rows, seed=3, window=window)
    epoch, number, row = order.place(position)
    assert epoch * order.rows_per_epoch + number * window + row == position
    assert row < len(order.window(epoch, number).order)
    after = order.place(position + 1)
    assert after == (epoch, number, row + 1) or after == (*order.following(epoch, number), 0)


@given(group_rows=groups, workers=st.integers(1, 4), window=st.integers(1, 30))
def test_a_window_holds_no_more_than_its_rows_and_the_groups_at_its_ends(
    group_rows: np.ndarray, workers: int, window: int
) -> None:
    workers = min(workers, int(group_rows.sum()))
    order = EpochOrder(group_rows, seed=0, workers=workers, window=window)
    held = order.window(0, 0)
    assert sum(span.stop - span.start for span in held.spans) == len(held.order) <= window
    # At most the first, the last, and the two at the ring's seam are cut.
    cut = [span for span in held.spans if span.stop - span.start < group_rows[span.group]]
    assert len(cut) <= 4


def test_a_worker_gets_other_rows_in_each_epoch_even_of_a_single_group() -> None:
    group_rows = np.array([64])
    order = EpochOrder(group_rows, seed=0, rank=1, workers=4, window=64)
    seen = {frozenset(stream(order, group_rows, epoch)) for epoch in range(5)}
    assert len(seen) == 5
