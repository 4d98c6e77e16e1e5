"""The order in which training reads a table: shuffled, divided over workers, and computable for any position.

In each epoch, the row groups of the table form a ring, in an order that is drawn from (seed, epoch). The ring is cut
into one stretch of rows for each worker; the lengths of two stretches differ by at most one row. A worker reads its
stretch in windows of a fixed number of rows. Within a window, the rows are shuffled by a draw from (seed, epoch,
worker, window).

This order has three properties. Each row comes exactly once in an epoch, for any number of workers. Only the row
groups at a cut are read by two workers. A stream can start at any position without reading the rows before it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

GROUPS, ROWS = 0, 1
"""Third number of the key from which a random order is drawn, after the seed and the epoch. It keeps the draws for row
groups and for rows apart."""


class Span(NamedTuple):
    """Consecutive rows of one row group: from `start` up to `stop`, which is not included."""

    group: int
    """Number of the row group in the table."""
    start: int
    stop: int


class Window(NamedTuple):
    """Rows that are shuffled together and are in memory together."""

    spans: list[Span]
    order: NDArray[np.int64]
    """Shape (rows,): the order in which the rows are read. Number i means row i of all spans, one after the other."""


class EpochOrder:
    """Computes where each row that a worker reads lies in the table."""

    def __init__(
        self, group_rows: NDArray[np.int64], *, seed: int, rank: int = 0, workers: int = 1, window: int
    ) -> None:
        """Args:
        group_rows: number of rows of each row group, shape (groups,).
        seed: 0 or more. All workers of a task use the same seed.
        rank: number of this worker, 0 to `workers` - 1.
        workers: number of workers that share the table.
        window: number of rows that are shuffled together, 1 or more.
        """
        self._group_rows = group_rows
        self._seed, self._rank, self._window = seed, rank, window
        total = int(group_rows.sum())
        self._start, self._stop = rank * total // workers, (rank + 1) * total // workers
        self.rows_per_epoch = self._stop - self._start
        """Number of rows that this worker reads in one epoch."""

    def place(self, position: int) -> tuple[int, int, int]:
        """Return where a position of the worker's stream lies: epoch, window, and place in that window's order."""
        epoch, row = divmod(position, self.rows_per_epoch)
        return epoch, *divmod(row, self._window)

    def following(self, epoch: int, number: int) -> tuple[int, int]:
        """Return epoch and number of the window after this one."""
        last = (self.rows_per_epoch - 1) // self._window
        return (epoch, number + 1) if number < last else (epoch + 1, 0)

    def window(self, epoch: int, number: int) -> Window:
        """Return the rows of a window, and the order in which they are read."""
        total = int(self._group_rows.sum())
        start = self._start + number * self._window
        stop = min(start + self._window, self._stop)
        draw = np.random.default_rng([self._seed, epoch, GROUPS])
        line = draw.permutation(len(self._group_rows))
        ends = np.cumsum(self._group_rows[line])
        # The first stretch starts at a random row. Otherwise, each worker of a table with few row groups would get
        # the same rows in every epoch.
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
