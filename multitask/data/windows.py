"""The windows of a training stream: their row groups are kept in memory, and the next window is fetched ahead."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from multitask.data.loading import EncodedRow
from multitask.data.order import EpochOrder, Span, Window
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
        self._places: tuple[tuple[int, int], _Places] | None = None

    def table_row(self, epoch: int, window: int, place: int) -> int:
        """Return the number in the table of the row that `row` would read. Nothing is fetched."""
        if self._places is None or self._places[0] != (epoch, window):
            self._places = (epoch, window), _Places(self._order.window(epoch, window))
        span, place_in_group = self._places[1].find(place)
        return self._table.first_row(span.group) + place_in_group

    def row(self, epoch: int, window: int, place: int) -> EncodedRow:
        """Return one row. The first row of a window fetches it, unless it was fetched ahead."""
        if self._current is None or self._current.key != (epoch, window):
            self._current = self._move(epoch, window)
        return self._current.row(place)

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
        groups = {span.group: at_hand.get(span.group) or self._table.read_group(span.group) for span in window.spans}
        return _LoadedWindow((epoch, number), _Places(window), groups, self._table)


class _Places:
    """Tells in which row group each row of a window lies."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._starts = np.cumsum([0, *(span.stop - span.start for span in window.spans)])

    def find(self, place: int) -> tuple[Span, int]:
        """Find a row of the window.

        Args:
            place: position of the row in the window's shuffled order.
        Returns:
            The span that contains the row, and the row's number in the row group of that span.
        """
        row = int(self._window.order[place])
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        span = self._window.spans[number]
        return span, span.start + row - int(self._starts[number])


class _LoadedWindow:
    """A window and its row groups in memory."""

    def __init__(self, key: tuple[int, int], places: _Places, groups: dict[int, RowGroup], table: ImageTable) -> None:
        self.key = key
        """Epoch, and number of the window in it."""
        self.groups = groups
        """Number of a row group -> the row group."""
        self._places, self._table = places, table

    def row(self, place: int) -> EncodedRow:
        """Return the row at a position of the window's shuffled order."""
        span, place_in_group = self._places.find(place)
        group = self.groups[span.group]
        return EncodedRow(
            epoch=self.key[0],
            row=self._table.first_row(span.group) + place_in_group,
            image=group.encoded(place_in_group),
            label=int(group.labels[place_in_group]),
        )
