"""Batches of a table: endless and shuffled for training (see order.py), one pass in order for evaluation."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from multitask.data.feature_cache import FeatureCache
from multitask.data.loading import EncodedRow, ImageLoader, Loaded, Undecodable, check_option
from multitask.data.order import EpochOrder, Span, Window
from multitask.data.table import ImageTable, RowGroup
from multitask.data.transforms import Augment, Crop, draw_crop, normalise

CROP = 1
"""First number of a crop's random key."""
SHUFFLE_WINDOW = 4096
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Images and labels of one step."""

    pixels: Tensor | None
    """Shape (batch, 3, resolution, resolution), uint8, channels last in memory: a quarter of the floats' bytes. None
    where stored features stand for the images."""
    labels: Tensor
    """Shape (batch,), int64."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    skipped: int = 0
    """Undecodable images that were passed over while this batch was gathered."""
    bad_images: tuple[str, ...] = ()
    """Those of them that are met for the first time: file, row and what is wrong."""
    position: int = 0
    """Rows of its stream that a worker has consumed with this batch: where another stream goes on."""
    rows: NDArray[np.int64] | None = None
    """Shape (batch,): numbers of the images in their table, where features are stored under them."""
    features: Mapping[int, Tensor] | None = None
    """What the frozen backbone gives for the images, as `PatchedModel.shared_part` has it, if all of it is stored."""

    def images(self, device: torch.device | str | None = None) -> Tensor:
        """What a model reads: shape (batch, 3, resolution, resolution), float32, normalised on `device`."""
        assert self.pixels is not None
        return normalise(self.pixels.to(device), self.mean, self.std)


class TrainStream:
    """The decoded images of one worker, endless, in batches of one size that run across the ends of epochs.

    At most two windows of encoded images are in memory: the one that is read, and the next, fetched meanwhile.
    """

    def __init__(
        self,
        table: ImageTable,
        *,
        batch_size: int,
        seed: int,
        augment: Augment = "none",
        rank: int = 0,
        workers: int = 1,
        undecodable: Undecodable = "fail",
        window: int = SHUFFLE_WINDOW,
        threads: int = 1,
        start: int = 0,
        cache: FeatureCache | None = None,
        decode_cached: bool = False,
    ) -> None:
        """Args:
        table: where the images are.
        batch_size: images of each batch; may exceed the table.
        seed: 0 or more; the workers of one task share it.
        augment: "none", or "crop_flip" for a random resized crop and a flip, fixed by seed, epoch and row.
        rank: this worker's number, 0 to workers - 1.
        workers: workers that share the table.
        undecodable: what an image that cannot be decoded does: end the run, or be skipped and counted.
        window: rows that are shuffled together.
        threads: threads that decode; they change no value.
        start: `position` of an earlier stream or of a batch: this one goes on from there, bit for bit.
        cache: where features of the table's images are stored: a batch that is all there comes with them.
        decode_cached: whether the images of such a batch are wanted too.
        """
        check_option("batch_size", batch_size, batch_size >= 1, "1 or more")
        check_option("augment", augment, augment in get_args(Augment), f"one of {list(get_args(Augment))}")
        check_option("seed", seed, seed >= 0, "0 or more")
        check_option("workers", workers, 1 <= workers <= table.num_rows, f"1 to {table.num_rows}, the table's rows")
        check_option("rank", rank, 0 <= rank < workers, f"0 to {workers - 1} with {workers} worker(s)")
        check_option("window", window, window >= 1, "1 or more")
        check_option("start", start, start >= 0, "0 or more")
        self.position = start
        """Rows consumed so far, skipped ones included."""
        self._table, self._batch_size = table, batch_size
        self._order = EpochOrder(table.group_rows, seed=seed, rank=rank, workers=workers, window=window)
        self.rows_per_epoch = self._order.rows_per_epoch
        """Rows this worker consumes in one epoch."""

        def crop(height: int, width: int, row: EncodedRow) -> Crop:
            return draw_crop(height, width, (CROP, seed, row.epoch, row.row))

        random_crop = crop if augment == "crop_flip" else None
        self._loader = ImageLoader(table, undecodable=undecodable, draw_crop=random_crop, threads=threads)
        self._windows = _Windows(table, self._order)
        self._cache, self._decode_cached = cache, decode_cached

    def draw(self, resolutions: Sequence[int]) -> "Drawn":
        """The next batch, at every resolution asked for; without images where stored features stand for them."""
        if self._cache is not None and not self._decode_cached:
            drawn = self._draw_cached(self._cache)
            if drawn is not None:
                return drawn
        drawn = self._draw_decoded(resolutions)
        found = self._cache.read(drawn.rows) if self._cache is not None and self._decode_cached else None
        return drawn if found is None else replace(drawn, features=found[1])

    def _draw_cached(self, cache: FeatureCache) -> "Drawn | None":
        """The next batch from the cache, if all of it is there; the table is not read."""
        ahead = 0
        rows: list[int] = []
        while len(rows) < self._batch_size:
            row = self._windows.number(*self._order.place(self.position + ahead))
            ahead += 1
            if not self._loader.found_bad(row):
                rows.append(row)
        numbers = np.array(rows, dtype=np.int64)
        found = cache.read(numbers)
        if found is None:
            return None
        self.position += ahead
        labels, features = found
        return Drawn({}, labels, numbers, skipped=ahead - len(rows), position=self.position, features=features)

    def _draw_decoded(self, resolutions: Sequence[int]) -> "Drawn":
        parts: list[Loaded] = []
        wanted, skipped = self._batch_size, 0
        while wanted:
            # No more rows than the batch still lacks, so that it ends where reading one by one would have ended it.
            rows = [self._row(self.position + ahead) for ahead in range(wanted)]
            self.position += len(rows)
            parts.append(self._loader.load(rows, resolutions))
            good = len(parts[-1][0])
            wanted -= good
            skipped += len(rows) - good
        return replace(_join(parts, skipped), bad_images=self._loader.take_bad(), position=self.position)

    def _row(self, position: int) -> EncodedRow:
        epoch, number, place = self._order.place(position)
        return self._windows.row(epoch, number, place)


@dataclass(frozen=True)
class Drawn:
    """One batch at several resolutions, as NumPy arrays: processes on one node hand them over without a copy."""

    pixels: dict[int, NDArray[np.uint8]]
    """Resolution -> shape (batch, resolution, resolution, 3): the order of decoder, resize and channels_last models.
    Empty where stored features stand for the images."""
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]
    """Numbers of the images in their table."""
    skipped: int
    bad_images: tuple[str, ...] = ()
    position: int = 0
    features: Mapping[int, Tensor] | None = None


class _Windows:
    """Holds the window that is read, and fetches the one after it in the background."""

    def __init__(self, table: ImageTable, order: EpochOrder) -> None:
        self._table, self._order = table, order
        self._thread = ThreadPoolExecutor(1, "fetch")
        self._current: _LoadedWindow | None = None
        self._next: tuple[tuple[int, int], Future[_LoadedWindow]] | None = None
        self._places: tuple[tuple[int, int], _Places] | None = None

    def number(self, epoch: int, number: int, place: int) -> int:
        """Which row of the table `row` gives; nothing is fetched for it."""
        if self._places is None or self._places[0] != (epoch, number):
            self._places = (epoch, number), _Places(self._order.window(epoch, number))
        span, place_in_group = self._places[1].find(place)
        return self._table.first_row(span.group) + place_in_group

    def row(self, epoch: int, number: int, place: int) -> EncodedRow:
        if self._current is None or self._current.key != (epoch, number):
            self._move(epoch, number)
        assert self._current is not None
        return self._current.row(place)

    def _move(self, epoch: int, number: int) -> None:
        if self._next is not None and self._next[0] == (epoch, number):
            self._current = self._next[1].result()
        else:
            self._current = self._fetch(epoch, number, {})
        following = self._order.following(epoch, number)
        self._next = following, self._thread.submit(self._fetch, *following, self._current.groups)

    def _fetch(self, epoch: int, number: int, at_hand: dict[int, RowGroup]) -> "_LoadedWindow":
        """A window's row groups; those at hand (of the window before it) are not read again."""
        window = self._order.window(epoch, number)
        groups = {span.group: at_hand.get(span.group) or self._table.read_group(span.group) for span in window.spans}
        return _LoadedWindow((epoch, number), _Places(window), groups, self._table)


class _Places:
    """Where the rows of a window lie in its row groups."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._starts = np.cumsum([0, *(span.stop - span.start for span in window.spans)])

    def find(self, place: int) -> tuple[Span, int]:
        """The span of a row of the window (in shuffled order), and the row's number in that row group."""
        row = int(self._window.order[place])
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        span = self._window.spans[number]
        return span, span.start + row - int(self._starts[number])


class _LoadedWindow:
    def __init__(self, key: tuple[int, int], places: _Places, groups: dict[int, RowGroup], table: ImageTable) -> None:
        self.key = key
        self.groups = groups
        self._places, self._table = places, table

    def row(self, place: int) -> EncodedRow:
        span, place_in_group = self._places.find(place)
        group = self.groups[span.group]
        return EncodedRow(
            epoch=self.key[0],
            row=self._table.first_row(span.group) + place_in_group,
            image=group.encoded(place_in_group),
            label=int(group.labels[place_in_group]),
        )


class TrainBatches:
    """Endless batches of one worker at one resolution, from a stream of its own."""

    def __init__(
        self, table: ImageTable, *, resolution: int, mean: Sequence[float], std: Sequence[float], **options: Any
    ) -> None:
        """Args:
        resolution: height and width of the images, in pixels.
        mean: for each channel, on the scale 0 to 1.
        std: for each channel, on the scale 0 to 1.
        options: batch size, seed and all else that `TrainStream` takes.
        """
        self._view = BatchView(resolution, mean, std)
        self._stream = TrainStream(table, **options)
        self.rows_per_epoch = self._stream.rows_per_epoch

    @property
    def position(self) -> int:
        """Rows consumed so far, skipped ones included."""
        return self._stream.position

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._view.batch(self._stream.draw([self._view.resolution]))


class BatchView:
    """How one task sees the images of a stream: its resolution and normalisation."""

    def __init__(self, resolution: int, mean: Sequence[float], std: Sequence[float]) -> None:
        # torch 2.15 cannot resize uint8 to a single pixel (an internal assertion fails).
        check_option("resolution", resolution, resolution >= 2, "2 or more pixels")
        check_option("mean", mean, len(mean) == 3, "three numbers, one for each channel")
        check_option("std", std, len(std) == 3 and min(std) > 0, "three numbers above 0, one for each channel")
        self.resolution = resolution
        self._mean = (mean[0], mean[1], mean[2])
        self._std = (std[0], std[1], std[2])

    def batch(self, drawn: Drawn) -> Batch:
        # What comes out of Ray's object store is read-only, which torch does not know: it gets a copy.
        labels = torch.from_numpy(np.require(drawn.labels, requirements="W"))
        pixels = None
        if drawn.pixels:
            array = np.require(drawn.pixels[self.resolution], requirements="W")
            pixels = torch.from_numpy(array).permute(0, 3, 1, 2)
        return Batch(
            pixels,
            labels,
            self._mean,
            self._std,
            skipped=drawn.skipped,
            bad_images=drawn.bad_images,
            position=drawn.position,
            rows=drawn.rows,
            features=drawn.features,
        )

    def batches(self, draw: Callable[[], Drawn]) -> Iterator[Batch]:
        """Endless batches of what `draw` returns."""
        while True:
            yield self.batch(draw())


def prefetch(batches: Iterator[Batch], depth: int = 2) -> Iterator[Batch]:
    """The same batches, of which up to `depth` are prepared in the background while one is used."""
    thread = ThreadPoolExecutor(1, "prefetch")
    try:
        waiting = deque(thread.submit(next, batches, None) for _ in range(depth))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, batches, None))
            yield batch
    finally:
        thread.shutdown(cancel_futures=True)


def eval_batches(
    table: ImageTable,
    *,
    batch_size: int,
    resolution: int,
    mean: Sequence[float],
    std: Sequence[float],
    undecodable: Undecodable = "fail",
    rows: int | None = None,
    threads: int = 1,
) -> Iterator[Batch]:
    """All rows in order, once; only the last batch may be short.

    Args:
        batch_size, undecodable, threads: as for `TrainStream`.
        resolution, mean, std: as for `TrainBatches`.
        rows: read only this many, spread evenly over the table (which may be sorted by class).
    """
    check_option("batch_size", batch_size, batch_size >= 1, "1 or more")
    check_option("rows", rows, rows is None or rows >= 1, "1 or more")
    loader = ImageLoader(table, undecodable=undecodable, threads=threads)
    return _eval_batches(_rows_in_order(table, rows), loader, BatchView(resolution, mean, std), batch_size)


def _rows_in_order(table: ImageTable, rows: int | None) -> Iterator[EncodedRow]:
    count = table.num_rows if rows is None else min(rows, table.num_rows)
    chosen = np.arange(count) * table.num_rows // count
    for number, size in enumerate(table.group_rows):
        first = table.first_row(number)
        here = chosen[(chosen >= first) & (chosen < first + size)] - first
        if len(here):
            group = table.read_group(number)
            for place in here.tolist():
                yield EncodedRow(0, first + place, group.encoded(place), int(group.labels[place]))


def _eval_batches(rows: Iterator[EncodedRow], loader: ImageLoader, view: BatchView, batch_size: int) -> Iterator[Batch]:
    # A full batch waits for the next image, so that skipped rows at the end are counted in a batch that exists.
    full: Drawn | None = None
    parts: list[Loaded] = []
    missing, skipped = batch_size, 0
    while chunk := list(islice(rows, missing)):
        parts.append(loader.load(chunk, [view.resolution]))
        for bad in loader.take_bad():
            log.warning("Skipped %s", bad)
        good = len(parts[-1][0])
        skipped += len(chunk) - good
        missing -= good
        if good and full is not None:
            yield view.batch(full)
            full = None
        if not missing:
            full = _join(parts, skipped)
            parts, missing, skipped = [], batch_size, 0
    if full is not None:
        yield view.batch(replace(full, skipped=full.skipped + skipped))
    else:
        yield view.batch(_join(parts, skipped))


def _join(parts: Sequence[Loaded], skipped: int) -> Drawn:
    """One batch of what was loaded piece by piece."""
    labels = np.array([row.label for good, _ in parts for row in good], dtype=np.int64)
    rows = np.array([row.row for good, _ in parts for row in good], dtype=np.int64)
    if len(parts) == 1:  # the usual case, without a copy
        pixels = parts[0][1]
    else:
        pixels = {size: torch.cat([images[size] for _, images in parts]) for size in parts[0][1]}
    arrays = {size: images.numpy() for size, images in pixels.items()}
    return Drawn(arrays, labels, rows, skipped)
