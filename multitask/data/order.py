"""The order in which training reads a table: shuffled, split over workers, and known in closed form.

In each epoch the table's row groups are laid in a ring, in an order drawn from (seed, epoch). The ring is cut into one
stretch of rows per worker, equal but for one row. A worker reads its stretch in windows of so many rows, the rows of a
window in an order drawn from (seed, epoch, worker, window). So each row comes once in an epoch whatever the number of
workers, only groups that lie across a cut are read twice, and any place is reached without reading what is before it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

GROUPS, ROWS = 0, 1
"""Part of a random key: keeps the two kinds of draws apart."""


class Span(NamedTuple):
    """Consecutive rows of one row group."""

    group: int
    start: int
    stop: int


class Window(NamedTuple):
    """The rows that are shuffled together and in memory together."""

    spans: list[Span]
    order: NDArray[np.int64]
    """Shape (rows,): a permutation of the spans' rows, one after the other."""


class EpochOrder:
    """Where each row that a worker reads is to be found."""

    def __init__(
        self, group_rows: NDArray[np.int64], *, seed: int, rank: int = 0, workers: int = 1, window: int
    ) -> None:
        """Args:
        group_rows: shape (groups,), the rows of each row group.
        rank: this worker's number, 0 to workers - 1.
        window: rows that are shuffled together, 1 or more.
        """
        self._group_rows = group_rows
        self._seed, self._rank, self._window = seed, rank, window
        total = int(group_rows.sum())
        self._start, self._stop = rank * total // workers, (rank + 1) * total // workers
        self.rows_per_epoch = self._stop - self._start
        """Rows that this worker reads in one epoch."""

    def place(self, position: int) -> tuple[int, int, int]:
        """Epoch, window and row of the window (in shuffled order) of the worker's row number `position`."""
        epoch, row = divmod(position, self.rows_per_epoch)
        return epoch, *divmod(row, self._window)

    def following(self, epoch: int, number: int) -> tuple[int, int]:
        """Epoch and number of the window after this one."""
        last = (self.rows_per_epoch - 1) // self._window
        return (epoch, number + 1) if number < last else (epoch + 1, 0)

    def window(self, epoch: int, number: int) -> Window:
        total = int(self._group_rows.sum())
        start = self._start + number * self._window
        stop = min(start + self._window, self._stop)
        draw = np.random.default_rng([self._seed, epoch, GROUPS])
        line = draw.permutation(len(self._group_rows))
        ends = np.cumsum(self._group_rows[line])
        # Where the first stretch begins is random too: else a table of few groups gave a worker the same rows for ever.
        turn = int(draw.integers(total))
        stretches = [(start + turn, min(stop + turn, total)), (max(start + turn, total) - total, stop + turn - total)]
        spans = []
        for first_row, end_row in stretches:
            if first_row >= end_row:
                continue
            first, last = np.searchsorted(ends, [first_row, end_row - 1], side="right")
            for place in range(first, last + 1):
                group = int(line[place])
                begin = int(ends[place] - self._group_rows[group])
                spans.append(Span(group, max(first_row, begin) - begin, min(end_row, int(ends[place])) - begin))
        draw = np.random.default_rng([self._seed, epoch, ROWS, self._rank, number])
        return Window(spans, draw.permutation(stop - start))
