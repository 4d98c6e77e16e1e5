"""The windows of a training stream: their row groups are kept in memory, and the next window is fetched ahead."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from multitask.data.loading import EncodedRow
from multitask.data.order import EpochOrder, Window
from multitask.data.table import ImageTable, RowGroup


class WindowReader:
    """Reads rows of one worker's stream, window by window.

    It holds at most two windows: the current one, and the one after it, which is fetched in the background. The numbers
    `epoch`, `window` and `place` of a row are those of `EpochOrder.place`.
    """

    def __init__(self, table: ImageTable, order: EpochOrder) -> None:
        self._table, self._order = table, order
        self._thread = ThreadPoolExecutor(1, "fetch")
        self._current: _LoadedWindow | None = None
        self._next: tuple[tuple[int, int], Future[_LoadedWindow]] | None = None
        self._looked_at: tuple[tuple[int, int], Window] | None = None

    def table_row(self, epoch: int, window: int, place: int) -> int:
        """Return the number in the table of the row that `row` would read. Nothing is fetched."""
        if self._looked_at is None or self._looked_at[0] != (epoch, window):
            self._looked_at = (epoch, window), self._order.window(epoch, window)
        rows = self._looked_at[1]
        return self._table.first_row(int(rows.groups[place])) + int(rows.rows[place])

    def row(self, epoch: int, window: int, place: int) -> EncodedRow:
        """Return one row. The first row of a window fetches it, unless it was fetched ahead."""
        if self._current is None or self._current.key != (epoch, window):
            self._current = self._move(epoch, window)
        current = self._current
        group, row = int(current.window.groups[place]), int(current.window.rows[place])
        return EncodedRow(
            epoch=epoch,
            row=self._table.first_row(group) + row,
            image=current.groups[group].encoded(row),
            label=int(current.groups[group].labels[row]),
            reading=int(current.window.readings[place]),
        )

    def _move(self, epoch: int, window: int) -> "_LoadedWindow":
        """Return a window, and start to fetch the one after it."""
        if self._next is not None and self._next[0] == (epoch, window):
            current = self._next[1].result()
        else:
            current = self._fetch(epoch, window, {})
        following = self._order.following(epoch, window)
        self._next = following, self._thread.submit(self._fetch, *following, current.groups)
        return current

    def _fetch(self, epoch: int, number: int, at_hand: dict[int, RowGroup]) -> "_LoadedWindow":
        """Load a window. Row groups in `at_hand`, those of the window before it, are not read again."""
        window = self._order.window(epoch, number)
        wanted = np.unique(window.groups).tolist()
        groups = {group: at_hand.get(group) or self._table.read_group(group) for group in wanted}
        return _LoadedWindow((epoch, number), window, groups)


class _LoadedWindow(NamedTuple):
    """A window and its row groups in memory."""

    key: tuple[int, int]
    """Epoch, and number of the window in it."""
    window: Window
    groups: dict[int, RowGroup]
    """Number of a row group -> the row group."""
