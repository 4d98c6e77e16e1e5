"""Labels and sizes in the figures of reports."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multitask.report.plots import human_bytes, spread


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.floats(0.1, 10))
def test_labels_never_overlap_and_keep_their_order(wanted: list[float], gap: float) -> None:
    placed = spread(wanted, gap, 0.0, 100.0)

    ordered = [placed[index] for index in sorted(range(len(wanted)), key=wanted.__getitem__)]
    assert all(after - before >= gap - 1e-6 for before, after in pairwise(ordered))
    assert all(gap / 2 - 1e-6 <= place <= 100 - gap / 2 + 1e-6 for place in placed)


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (54_321, "54.3 kB"), (1_000_000, "1.0 MB")])
def test_sizes_are_readable(size: int, text: str) -> None:
    assert human_bytes(size) == text
