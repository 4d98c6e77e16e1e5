from collections import Counter
from math import ceil, floor

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from multitask.data.order import EpochOrder, draw_readings

groups = st.lists(st.integers(1, 9), min_size=1, max_size=12).map(lambda rows: np.array(rows, dtype=np.int64))
labels_of_groups = st.lists(st.sampled_from([0, 0, 0, 1, 2, 5]), min_size=1, max_size=9)
labelled_groups = st.lists(labels_of_groups, min_size=1, max_size=12).map(
    lambda groups: (np.array([len(labels) for labels in groups]), np.concatenate(groups))
)
"""Row groups, and labels of their rows, most of them 0; classes 3 and 4 have no rows."""


def readings(order: EpochOrder, group_rows: np.ndarray, epoch: int) -> list[tuple[int, int]]:
    """Table rows of one worker's epoch, in order, and how often each came before."""
    starts = np.concatenate([[0], np.cumsum(group_rows)])
    found: list[tuple[int, int]] = []
    place = order.place(epoch * order.rows_per_epoch)[:2]
    while place[0] == epoch:
        window = order.window(*place)
        found += zip((starts[window.groups] + window.rows).tolist(), window.readings.tolist(), strict=True)
        place = order.following(*place)
    return found


def stream(order: EpochOrder, group_rows: np.ndarray, epoch: int) -> list[int]:
    """Table rows of one worker's epoch, in order."""
    return [row for row, _ in readings(order, group_rows, epoch)]


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
    assert row < len(order.window(epoch, number).rows)
    after = order.place(position + 1)
    assert after == (epoch, number, row + 1) or after == (*order.following(epoch, number), 0)


@given(group_rows=groups, workers=st.integers(1, 4), window=st.integers(1, 30))
def test_a_window_holds_no_more_than_its_rows_and_the_groups_at_its_ends(
    group_rows: np.ndarray, workers: int, window: int
) -> None:
    workers = min(workers, int(group_rows.sum()))
    order = EpochOrder(group_rows, seed=0, workers=workers, window=window)
    held = order.window(0, 0)
    assert len(held.groups) == len(held.rows) == len(held.readings) <= window
    # At most the first, the last, and the two at the ring's seam are cut.
    cut = [group for group, rows in Counter(held.groups.tolist()).items() if rows < group_rows[group]]
    assert len(cut) <= 4


def test_a_worker_gets_other_rows_in_each_epoch_even_of_a_single_group() -> None:
    group_rows = np.array([64])
    order = EpochOrder(group_rows, seed=0, rank=1, workers=4, window=64)
    seen = {frozenset(stream(order, group_rows, epoch)) for epoch in range(5)}
    assert len(seen) == 5


@settings(max_examples=50)
@given(table=labelled_groups, seed=st.integers(0, 2**40), epoch=st.integers(0, 9))
def test_balanced_classes_share_an_epoch_equally_and_so_do_the_rows_of_a_class(
    table: tuple[np.ndarray, np.ndarray], seed: int, epoch: int
) -> None:
    _, labels = table
    rows, classes = len(labels), len(set(labels.tolist()))

    found = draw_readings(labels, seed, epoch)

    assert found.sum() == rows
    for label in set(labels.tolist()):
        of_class = found[labels == label]
        assert of_class.sum() in (floor(rows / classes), ceil(rows / classes))
        expected = rows / (classes * len(of_class))
        assert set(of_class.tolist()) <= {floor(expected), ceil(expected)}
    assert np.array_equal(found, draw_readings(labels, seed, epoch))


def test_each_row_of_a_class_is_expected_equally_often() -> None:
    labels = np.array([0] * 13 + [1] * 3 + [2] * 4)
    expected = len(labels) / (3 * np.bincount(labels))[labels]

    found = np.mean([draw_readings(labels, 0, epoch) for epoch in range(2000)], axis=0)

    # The standard deviation of a draw of floor or ceil is at most 1/2, that of the mean of 2000 at most 0.012.
    np.testing.assert_allclose(found, expected, atol=0.05)


@settings(max_examples=50)
@given(table=labelled_groups, workers=st.integers(1, 5), window=st.integers(1, 30), seed=st.integers(0, 2**40))
def test_workers_share_the_readings_of_a_balanced_epoch_without_overlap(
    table: tuple[np.ndarray, np.ndarray], workers: int, window: int, seed: int
) -> None:
    group_rows, labels = table
    workers = min(workers, len(labels))
    orders = [
        EpochOrder(group_rows, seed=seed, rank=rank, workers=workers, window=window, labels=labels)
        for rank in range(workers)
    ]
    for epoch in (0, 3):
        shares = [readings(order, group_rows, epoch) for order in orders]
        assert [len(share) for share in shares] == [order.rows_per_epoch for order in orders]
        times = draw_readings(labels, seed, epoch).tolist()
        expected = [(row, reading) for row, count in enumerate(times) for reading in range(count)]
        assert sorted(reading for share in shares for reading in share) == expected


def test_a_window_fetches_no_row_group_that_it_does_not_read() -> None:
    """All rows of the frequent class are in the second group, of which an epoch reads one row."""
    group_rows, labels = np.array([1, 5]), np.array([0, 1, 1, 1, 1, 1])
    order = EpochOrder(group_rows, seed=0, window=1, labels=labels)
    windows = [order.window(0, number) for number in range(6)]
    assert [len(set(window.groups.tolist())) for window in windows] == [1] * 6
    assert sum(int(window.groups[0]) == 0 for window in windows) == 3


def test_a_natural_order_is_that_of_version_0_1() -> None:
    """Runs of earlier versions go on with the images that they would have seen."""
    order = EpochOrder(np.array([2, 3, 4]), seed=7, rank=1, workers=2, window=4)
    windows = [order.window(2, number) for number in (0, 1)]
    assert [list(zip(w.groups.tolist(), w.rows.tolist(), strict=True)) for w in windows] == [
        [(1, 2), (0, 0), (0, 1), (1, 1)],
        [(2, 0)],
    ]
