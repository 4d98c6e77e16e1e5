"""From encoded rows to pixels at every resolution asked for: each image is decoded once."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import Literal, get_args

import torch
from torch import Tensor

from multitask.data.storage import DataError
from multitask.data.table import ImageTable
from multitask.data.transforms import Crop, cut, decode, resize_images

Undecodable = Literal["fail", "skip"]


@dataclass(frozen=True)
class EncodedRow:
    """One row of a table, at one place of a stream."""

    epoch: int
    row: int
    """Number in the table."""
    image: Tensor
    """Shape (bytes,), uint8."""
    label: int


Loaded = tuple[list[EncodedRow], dict[int, Tensor]]
"""Rows that could be decoded, and resolution -> their pixels, shape (n, resolution, resolution, 3), uint8."""


class ImageLoader:
    """Decodes and resizes rows of one table, on one thread or several."""

    def __init__(
        self,
        table: ImageTable,
        *,
        undecodable: Undecodable,
        draw_crop: Callable[[int, int, EncodedRow], Crop] | None = None,
        threads: int = 1,
    ) -> None:
        """Args:
        undecodable: what an image that cannot be decoded does: end the run, or be left out.
        draw_crop: from height, width (pixels) and row to the part of the image to keep; None keeps all of it.
        threads: threads that decode; more than one of them only makes it faster.
        """
        choices = list(get_args(Undecodable))
        check_option("undecodable", undecodable, undecodable in choices, f"one of {choices}")
        check_option("threads", threads, threads >= 1, "1 or more")
        self._table = table
        self._undecodable = undecodable
        self._draw_crop = draw_crop
        self._threads = threads
        # torch.set_num_threads is left alone: called in one thread, it changes all threads of the process.
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None
        self._bad_rows: set[int] = set()
        self._new_bad: list[str] = []

    def load(self, rows: Sequence[EncodedRow], resolutions: Sequence[int]) -> Loaded:
        """Decode each row once and resize it to each resolution.

        Raises:
            DataError: an image cannot be decoded and `undecodable` is "fail", or no image of the table can be.
        """
        # A row found bad before is not tried, and not named, once more in each epoch.
        untried = [row for row in rows if row.row not in self._bad_rows]
        if self._pool is None:
            loaded = [self._load_part(untried, resolutions)]
        else:
            bounds = [len(untried) * part // self._threads for part in range(self._threads + 1)]
            parts = [untried[start:stop] for start, stop in pairwise(bounds)]
            loaded = list(self._pool.map(self._load_part, parts, repeat(resolutions)))
        good = [row for part, _ in loaded for row in part]
        self._bad_rows.update({row.row for row in untried} - {row.row for row in good})
        if len(self._bad_rows) == self._table.num_rows:
            raise DataError(
                f"{self._table.uri}: found no image that can be decoded in {self._table.num_rows} rows, expected PNG "
                "or JPEG. Check that the column 'image' holds whole encoded files, then write the table anew."
            )
        if len(loaded) == 1:
            return good, loaded[0][1]
        return good, {size: torch.cat([pixels[size] for _, pixels in loaded]) for size in resolutions}

    def _load_part(self, rows: Sequence[EncodedRow], resolutions: Sequence[int]) -> Loaded:
        good: list[EncodedRow] = []
        pixels = resize_images(self._images(rows, good), resolutions, len(rows))
        return good, pixels

    def _images(self, rows: Sequence[EncodedRow], good: list[EncodedRow]) -> Iterator[Tensor]:
        """Pixels of each row that can be decoded; the row itself goes to `good`."""
        for row in rows:
            image_chw = self._decoded(row)
            if image_chw is None:
                continue
            if self._draw_crop is not None:
                height, width = image_chw.shape[1:]
                image_chw = cut(image_chw, self._draw_crop(height, width, row))
            good.append(row)
            yield image_chw

    def _decoded(self, row: EncodedRow) -> Tensor | None:
        """Pixels of a row, or None when it cannot be decoded and such images are skipped."""
        try:
            return decode(row.image)
        except RuntimeError as error:
            source, reason = self._table.source(row.row), str(error).partition("\n")[0]
            if self._undecodable == "fail":
                raise DataError(
                    f"{source}: found an image that cannot be decoded ({reason}), expected a whole PNG or JPEG. "
                    "Replace it in the table, or set undecodable='skip' to count and skip such images."
                ) from error
            self._new_bad.append(f"{source}: the image cannot be decoded ({reason})")
            return None

    def found_bad(self, row: int) -> bool:
        """Whether a row of the table could not be decoded when it was tried."""
        return row in self._bad_rows

    def take_bad(self) -> tuple[str, ...]:
        """Images left out since the last call, each named once with its file, row and what is wrong with it."""
        taken, self._new_bad = tuple(self._new_bad), []
        return taken


def check_option(name: str, value: object, fits: bool, allowed: str) -> None:
    """Raises:
    ValueError: an option of a reader is out of its range.
    """
    if not fits:
        raise ValueError(f"{name} is {value!r}, but allowed is {allowed}. Change {name}.")
