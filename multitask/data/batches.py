"""Batches of a table as one task sees them: endless and shuffled for training, one pass in order for evaluation."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from multitask.data.loading import EncodedRow, ImageLoader, Loaded, Undecodable, check_option
from multitask.data.stream import Drawn, TrainStream, join_parts
from multitask.data.table import ImageTable
from patches.images.preprocessing import Preprocessing, Resize
from patches.images.resizing import normalise

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Images and labels of one step."""

    pixels: Tensor | None
    """Shape (batch, 3, resolution, resolution), uint8, channels last in memory: a quarter of the bytes of floats. None
    if the batch has stored features in place of images."""
    labels: Tensor
    """Shape (batch,), int64."""
    mean: tuple[float, float, float]
    """Subtracted from each channel, on the scale 0 to 1."""
    std: tuple[float, float, float]
    """Divisor of each channel, on the scale 0 to 1."""
    skipped: int = 0
    """Number of undecodable images that were skipped while this batch was gathered."""
    bad_images: tuple[str, ...] = ()
    """The skipped images that were met for the first time: file, row, and what is wrong."""
    position: int = 0
    """Number of rows of its stream that the worker has consumed, this batch included. Another stream can start here."""
    rows: NDArray[np.int64] | None = None
    """Shape (batch,): number of each image in the table, under which its features are stored."""
    features: Mapping[int, Tensor] | None = None
    """Stored output of the frozen backbone for the images, in the form of `PatchedModel.shared_part`, or None if not
    all of it is stored."""

    def images(self, device: torch.device | str | None = None) -> Tensor:
        """Return the input of a model: shape (batch, 3, resolution, resolution), float32, normalised on `device`."""
        assert self.pixels is not None
        return normalise(self.pixels.to(device), self.mean, self.std)


class BatchView:
    """How one task sees the images of a stream: its preprocessing without the framing, which is the stream's."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def batch(self, drawn: Drawn) -> Batch:
        """Return the batch at this resolution."""
        # Arrays from Ray's object store are read-only, and torch does not support that, so they are copied.
        labels = torch.from_numpy(np.require(drawn.labels, requirements="W"))
        pixels = None
        if drawn.pixels:
            array = np.require(drawn.pixels[self.preprocessing.resolution], requirements="W")
            pixels = torch.from_numpy(array).permute(0, 3, 1, 2)
        return Batch(
            pixels,
            labels,
            self.preprocessing.mean,
            self.preprocessing.std,
            skipped=drawn.skipped,
            bad_images=drawn.bad_images,
            position=drawn.position,
            rows=drawn.rows,
            features=drawn.features,
        )

    def batches(self, draw: Callable[[], Drawn]) -> Iterator[Batch]:
        """Call `draw` again and again, without end, and yield each result as a batch."""
        while True:
            yield self.batch(draw())


class TrainBatches:
    """Endless training batches of one worker at one resolution."""

    def __init__(
        self,
        table: ImageTable,
        *,
        resolution: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        resize: Resize = "squash",
        **options: Any,
    ) -> None:
        """Args:
        table: the images.
        resolution, mean, std, resize: as in `Preprocessing`.
        options: the other arguments of `TrainStream`, such as `batch_size` and `seed`.
        """
        preprocessing = Preprocessing(resolution, mean, std, resize)
        self._view = BatchView(preprocessing)
        self._stream = TrainStream(table, framing=preprocessing.framing, **options)
        self.rows_per_epoch = self._stream.rows_per_epoch
        """Number of rows that this worker consumes in one epoch."""

    @property
    def position(self) -> int:
        """Number of rows consumed so far, skipped ones included."""
        return self._stream.position

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._view.batch(self._stream.draw([self._view.preprocessing.resolution]))


def prefetch(batches: Iterator[Batch], depth: int = 2) -> Iterator[Batch]:
    """Yield the same batches, and prepare up to `depth` further ones in the background while one is used."""
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
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    resize: Resize = "squash",
    undecodable: Undecodable = "fail",
    rows: int | None = None,
    threads: int = 1,
) -> Iterator[Batch]:
    """Yield each row once, in the order of the table. Only the last batch may be short.

    Args:
        table: the images.
        batch_size, undecodable, threads: as in `TrainStream`.
        resolution, mean, std, resize: as in `Preprocessing`.
        rows: read only this many rows, spread evenly over the table, because a table may be sorted by class.
    """
    check_option("batch_size", batch_size, batch_size >= 1, "1 or more")
    check_option("rows", rows, rows is None or rows >= 1, "1 or more")
    preprocessing = Preprocessing(resolution, mean, std, resize)
    loader = ImageLoader(table, undecodable=undecodable, framing=preprocessing.framing, threads=threads)
    return _eval_batches(_rows_in_order(table, rows), loader, BatchView(preprocessing), batch_size)


def _rows_in_order(table: ImageTable, rows: int | None) -> Iterator[EncodedRow]:
    """Yield all rows of a table, or `rows` of them that are spread evenly."""
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
    """Decode rows and yield them as batches."""
    # A full batch is held back until a further image is decoded. If only undecodable rows follow, this last batch can
    # still count them.
    full: Drawn | None = None
    parts: list[Loaded] = []
    missing, skipped = batch_size, 0
    while chunk := list(islice(rows, missing)):
        parts.append(loader.load(chunk, [view.preprocessing.resolution]))
        for bad in loader.take_bad():
            log.warning("Skipped %s", bad)
        good = len(parts[-1].rows)
        skipped += len(chunk) - good
        missing -= good
        if good and full is not None:
            yield view.batch(full)
            full = None
        if not missing:
            full = join_parts(parts, skipped)
            parts, missing, skipped = [], batch_size, 0
    if full is not None:
        yield view.batch(replace(full, skipped=full.skipped + skipped))
    else:
        yield view.batch(join_parts(parts, skipped))
