"""The order in which training reads a table: shuffled, divided over workers, and computable for any position.

In each epoch, the row groups of the table form a ring, in an order that is drawn from (seed, epoch). The ring is cut
into one stretch of rows for each worker; the lengths of two stretches differ by at most one row. A worker reads its
stretch in windows of a fixed number of rows. Within a window, the rows are shuffled by a draw from (seed, epoch,
worker, window).

This order has three properties. Each row comes exactly once in an epoch, for any number of workers. Only the row
groups at a cut are read by two workers. A stream can start at any position without reading the rows before it.

Where the classes are balanced, the ring has each row as often as `draw_readings` says, and all else stays as it is: an
epoch is as long as before, and a row that comes several times has its places side by side in the ring.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

GROUPS, ROWS, READINGS = 0, 1, 2
"""Third number of the key from which a random order is drawn, after the seed and the epoch. It keeps the draws for row
groups, for rows and for the readings of a row apart."""


class Window(NamedTuple):
    """Rows that are shuffled together and are in memory together, in the order in which they are read."""

    groups: NDArray[np.int64]
    """Shape (rows,): the row group of each row."""
    rows: NDArray[np.int64]
    """Shape (rows,): the number of each row in its row group."""
    readings: NDArray[np.int64]
    """Shape (rows,): 0 for the first place of a row in the epoch, 1 for the second, and so on. Places are counted along
    the ring, so two workers never count the same one."""


class EpochOrder:
    """Computes where each row that a worker reads lies in the table."""

    def __init__(
        self,
        group_rows: NDArray[np.int64],
        *,
        seed: int,
        rank: int = 0,
        workers: int = 1,
        window: int,
        labels: NDArray[np.int64] | None = None,
    ) -> None:
        """Args:
        group_rows: number of rows of each row group, shape (groups,).
        seed: 0 or more. All workers of a task use the same seed.
        rank: number of this worker, 0 to `workers` - 1.
        workers: number of workers that share the table.
        window: number of rows that are shuffled together, 1 or more.
        labels: label of each row of the table, shape (rows,), by which the classes are balanced. Without them, each
            row comes once in an epoch.
        """
        self._group_rows = group_rows
        self._starts = np.concatenate([[0], np.cumsum(group_rows)])
        self._seed, self._rank, self._window = seed, rank, window
        self._labels = labels
        # The thread that fetches the next window may be one epoch ahead.
        self._ring = lru_cache(maxsize=2)(self._draw_ring)
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
        """Return the rows of a window, in the order in which they are read."""
        total = int(self._starts[-1])
        start = self._start + number * self._window
        stop = min(start + self._window, self._stop)
        sizes, readings = self._ring(epoch)
        draw = np.random.default_rng([self._seed, epoch, GROUPS])
        line = draw.permutation(len(sizes))
        ends = np.cumsum(sizes[line])
        # The first stretch starts at a random row. Otherwise, each worker of a table with few row groups would get
        # the same rows in every epoch.
        turn = int(draw.integers(total))
        stretches = [(start + turn, min(stop + turn, total)), (max(start + turn, total) - total, stop + turn - total)]
        parts = []
        for first_row, end_row in stretches:
            if first_row >= end_row:
                continue
            first, last = np.searchsorted(ends, [first_row, end_row - 1], side="right")
            for place in range(first, last + 1):
                group = int(line[place])
                begin = int(ends[place] - sizes[group])
                part = slice(max(first_row, begin) - begin, min(end_row, int(ends[place])) - begin)
                parts.append(self._part_of(group, part, readings))
        draw = np.random.default_rng([self._seed, epoch, ROWS, self._rank, number])
        order = draw.permutation(stop - start)
        return Window(*(np.concatenate(columns)[order] for columns in zip(*parts, strict=True)))

    def _draw_ring(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Return what an epoch's ring holds.

        Returns:
            The number of places that each row group has in the ring, shape (groups,); and how often each row of the
            table comes, shape (rows,), or None if each comes once.
        """
        if self._labels is None:
            return self._group_rows, None
        readings = draw_readings(self._labels, self._seed, epoch)
        until = np.concatenate([[0], np.cumsum(readings)])[self._starts]
        return until[1:] - until[:-1], readings

    def _part_of(self, group: int, part: slice, readings: NDArray[np.int64] | None) -> Window:
        """Return a part of the places that a row group has in the ring, in the order of the table."""
        rows = np.arange(self._group_rows[group])
        if readings is not None:
            rows = np.repeat(rows, readings[self._starts[group] : self._starts[group + 1]])
        before = np.arange(len(rows)) - np.searchsorted(rows, rows)
        return Window(np.full(len(rows), group)[part], rows[part], before[part])


def draw_readings(labels: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """Draw how often each row comes in an epoch in which all classes have the same number of rows.

    Of N rows in C classes, each class gets N / C, rounded up or down so that the sum is N. A row of a class that has n
    rows comes N / (C n) times on average over the epochs, and in one epoch that number of times rounded up or down.
    A class that has no rows does not count.

    Args:
        labels: shape (N,).
    Returns:
        Shape (N,), with the sum N.
    """
    draw = np.random.default_rng([seed, epoch, READINGS])
    _, label, rows_of = np.unique(labels, return_inverse=True, return_counts=True)
    share, more = divmod(len(labels), len(rows_of))
    shares = share + (draw.permutation(len(rows_of)) < more)
    # Number the rows of each class in a random order: the first ones of a class are read once more than the others.
    shuffled = draw.permutation(len(labels))
    by_class = shuffled[np.argsort(label[shuffled], kind="stable")]
    number = np.empty(len(labels), dtype=np.int64)
    number[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(rows_of) - rows_of, rows_of)
    return (shares // rows_of)[label] + (number < (shares % rows_of)[label])
