"""Batches of a table: endless and shuffled for training, one pass in order for evaluation.

Training order: in each epoch a permutation of all rows, drawn from (seed, epoch), is dealt out to the workers like
cards. So each row comes once in an epoch whatever the number of workers, and a worker's place in its stream is one
number, the rows it has consumed.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from multitask.data.format import DataError
from multitask.data.table import ImageTable
from multitask.data.transforms import Augment, Crop, decode, draw_crop, normalise, resize_images

Undecodable = Literal["fail", "skip"]
SHUFFLE, CROP = 0, 1
"""First number of a random key: keeps the two kinds of draws apart."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Images and labels of one step."""

    images: Tensor
    """Shape (batch, 3, resolution, resolution), float32."""
    labels: Tensor
    """Shape (batch,), int64."""
    skipped: int
    """Undecodable images that were passed over while this batch was gathered."""


class TrainBatches:
    """Endless batches of one worker, all of one size: they run across the ends of epochs.

    Args:
        table: where the images are.
        batch_size: images of each batch; may exceed the table.
        resolution: height and width of the images, in pixels.
        mean: for each channel, on the scale 0 to 1.
        std: for each channel, on the scale 0 to 1.
        augment: "none", or "crop_flip" for a random resized crop and a flip, fixed by seed, epoch and row.
        seed: 0 or more; the workers of one task share it.
        rank: this worker's number, 0 to workers - 1.
        workers: workers that share the table.
        undecodable: what an image that cannot be decoded does: end the run, or be skipped and counted.
        start: `position` of an earlier instance: this one goes on from there, bit for bit.
    """

    def __init__(
        self,
        table: ImageTable,
        *,
        batch_size: int,
        resolution: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        augment: Augment = "none",
        rank: int = 0,
        workers: int = 1,
        undecodable: Undecodable = "fail",
        start: int = 0,
    ) -> None:
        _check_options(batch_size, resolution, mean, std, undecodable)
        _check_option("augment", augment, augment in get_args(Augment), f"one of {list(get_args(Augment))}")
        _check_option("seed", seed, seed >= 0, "0 or more")
        _check_option("workers", workers, 1 <= workers <= table.num_rows, f"1 to {table.num_rows}, the table's rows")
        _check_option("rank", rank, 0 <= rank < workers, f"0 to {workers - 1} with {workers} worker(s)")
        _check_option("start", start, start >= 0, "0 or more")
        self.position = start
        """Rows consumed so far, skipped ones included."""
        self._table, self._batch_size, self._resolution = table, batch_size, resolution
        self._mean, self._std, self._augment = tuple(mean), tuple(std), augment
        self._seed, self._rank, self._workers, self._undecodable = seed, rank, workers, undecodable
        self.rows_per_epoch = len(range(rank, table.num_rows, workers))
        """Rows this worker consumes in one epoch."""
        self._order: tuple[int, NDArray[np.int64]] | None = None
        self._bad_rows: set[int] = set()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        images: list[Tensor] = []
        rows: list[int] = []
        crops: list[Crop] = []
        skipped = 0
        while len(images) < self._batch_size:
            epoch, row = self._row(self.position)
            # A row found bad before is not tried, and not named in the log, once more in each epoch.
            image_chw = None if row in self._bad_rows else _decoded(self._table, row, self._undecodable)
            self.position += 1
            if image_chw is None:
                skipped += 1
                self._bad_rows.add(row)
                if len(self._bad_rows) == self._table.num_rows:
                    raise _nothing_decodable(self._table)
                continue
            images.append(image_chw)
            rows.append(row)
            if self._augment == "crop_flip":
                height, width = image_chw.shape[1:]
                crops.append(draw_crop(height, width, (CROP, self._seed, epoch, row)))
        resized_nchw = resize_images(images, self._resolution, crops or None)
        return Batch(normalise(resized_nchw, self._mean, self._std), _labels(self._table, rows), skipped)

    def _row(self, position: int) -> tuple[int, int]:
        """Epoch and table row of a place in this worker's stream."""
        epoch, place = divmod(position, self.rows_per_epoch)
        if self._order is None or self._order[0] != epoch:
            shuffled = np.random.default_rng([SHUFFLE, self._seed, epoch]).permutation(self._table.num_rows)
            self._order = epoch, shuffled[self._rank :: self._workers].copy()
        return epoch, int(self._order[1][place])


def eval_batches(
    table: ImageTable,
    *,
    batch_size: int,
    resolution: int,
    mean: Sequence[float],
    std: Sequence[float],
    undecodable: Undecodable = "fail",
    rows: int | None = None,
) -> Iterator[Batch]:
    """All rows in order, once; only the last batch may be short. Arguments as for `TrainBatches`.

    Args:
        rows: read only this many, spread evenly over the table (which may be sorted by class).
    """
    _check_options(batch_size, resolution, mean, std, undecodable)
    _check_option("rows", rows, rows is None or rows >= 1, "1 or more")
    chosen = range(table.num_rows) if rows is None else _spread(rows, table.num_rows)
    return _eval_batches(table, chosen, batch_size, resolution, tuple(mean), tuple(std), undecodable)


def _spread(rows: int, of: int) -> list[int]:
    """`rows` row numbers at even distances; all where there are fewer."""
    count = min(rows, of)
    return [place * of // count for place in range(count)]


def _eval_batches(
    table: ImageTable,
    chosen: Sequence[int],
    batch_size: int,
    resolution: int,
    mean: Sequence[float],
    std: Sequence[float],
    undecodable: Undecodable,
) -> Iterator[Batch]:
    images: list[Tensor] = []
    rows: list[int] = []
    skipped = 0

    def batch() -> Batch:
        return Batch(normalise(resize_images(images, resolution), mean, std), _labels(table, rows), skipped)

    for row in chosen:
        image_chw = _decoded(table, row, undecodable)
        if image_chw is None:
            skipped += 1
            continue
        # A full batch waits for the next image, so that skipped rows at the end are counted in a batch that exists.
        if len(images) == batch_size:
            yield batch()
            images, rows, skipped = [], [], 0
        images.append(image_chw)
        rows.append(row)
    if not images:
        raise _nothing_decodable(table)
    yield batch()


def _decoded(table: ImageTable, row: int, undecodable: Undecodable) -> Tensor | None:
    """Pixels of a row, or None when it cannot be decoded and such images are skipped."""
    try:
        return decode(table.encoded_tensor(row))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if undecodable == "fail":
            raise DataError(
                f"{table.source(row)}: found an image that cannot be decoded ({reason}), expected a whole PNG or "
                "JPEG. Replace it in the table, or set undecodable='skip' to count and skip such images."
            ) from error
        log.warning("Skipped %s: the image cannot be decoded (%s)", table.source(row), reason)
        return None


def _labels(table: ImageTable, rows: Sequence[int]) -> Tensor:
    return torch.from_numpy(table.labels[rows])


def _nothing_decodable(table: ImageTable) -> DataError:
    return DataError(
        f"{table.uri}: found no image that can be decoded in {table.num_rows} rows, expected PNG or JPEG. "
        "Check that the column 'image' holds whole encoded files, then write the table anew."
    )


def _check_options(
    batch_size: int, resolution: int, mean: Sequence[float], std: Sequence[float], undecodable: str
) -> None:
    _check_option("batch_size", batch_size, batch_size >= 1, "1 or more")
    # torch 2.15 cannot resize uint8 to a single pixel (an internal assertion fails).
    _check_option("resolution", resolution, resolution >= 2, "2 or more pixels")
    _check_option("mean", mean, len(mean) == 3, "three numbers, one for each channel")
    _check_option("std", std, len(std) == 3 and min(std) > 0, "three numbers above 0, one for each channel")
    choices = get_args(Undecodable)
    _check_option("undecodable", undecodable, undecodable in choices, f"one of {list(choices)}")


def _check_option(name: str, value: object, fits: bool, allowed: str) -> None:
    if not fits:
        raise ValueError(f"{name} is {value!r}, but allowed is {allowed}. Change {name}.")
