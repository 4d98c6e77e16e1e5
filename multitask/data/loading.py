"""Decoding of rows: each image is decoded once, and then resized to every resolution that is needed."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, repeat
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from multitask.data.augmentation import Augmentation
from multitask.data.storage import DataError
from multitask.data.table import ImageTable
from multitask.data.transforms import decode, resize_images
from patches.quoting import quoted

Undecodable = Literal["fail", "skip"]
"""What happens to an image that cannot be decoded: an error, or it is skipped and counted."""
MOST_LOST = 0.1
"""Share of the images of a class that can be skipped without a warning."""


@dataclass(frozen=True)
class EncodedRow:
    """One row of a table, as a stream reads it."""

    epoch: int
    """Epoch in which the row is read."""
    row: int
    """Number of the row in the table."""
    image: Tensor
    """Encoded image, shape (bytes,), uint8."""
    label: int
    reading: int = 0
    """How often the row came before in the epoch; above 0 only where the classes are balanced."""

    @property
    def key(self) -> tuple[int, ...]:
        """The row's part of the random key of its augmentation, which differs for each reading of the row."""
        return (self.epoch, self.row, self.reading) if self.reading else (self.epoch, self.row)


class Loaded(NamedTuple):
    """Rows that could be decoded, and their pixels."""

    rows: list[EncodedRow]
    pixels: dict[int, Tensor]
    """Resolution -> shape (rows, resolution, resolution, 3), uint8."""


class ImageLoader:
    """Decodes and resizes rows of one table, on one or several threads, and remembers undecodable ones."""

    def __init__(
        self,
        table: ImageTable,
        *,
        undecodable: Undecodable,
        augmentation: Augmentation | None = None,
        threads: int = 1,
    ) -> None:
        """Args:
        table: the table that contains the rows.
        undecodable: what happens to an image that cannot be decoded: "fail" raises an error, "skip" leaves it out.
        augmentation: changes the images at random. None leaves them as they are.
        threads: number of threads that decode. It changes no value.
        """
        choices = list(get_args(Undecodable))
        check_option("undecodable", undecodable, undecodable in choices, f"one of {choices}")
        check_option("threads", threads, threads >= 1, "1 or more")
        self.table = table
        self._undecodable = undecodable
        self._augmentation = augmentation
        self._threads = threads
        # torch.set_num_threads is not called here, because it would change all threads of the process.
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None
        self._bad_rows: set[int] = set()
        self._new_bad: list[str] = []
        self._lost: Counter[int] = Counter()
        self._reported: set[int] = set()
        self.lost_classes: list[str] = []
        """Names of the classes of which no image can be decoded, as a message quotes them."""

    def load(self, rows: Sequence[EncodedRow], resolutions: Sequence[int]) -> Loaded:
        """Decode each row once and resize it to each resolution.

        Raises:
            DataError: an image cannot be decoded and `undecodable` is "fail", or no image of the whole table can be
                decoded.
        """
        # Rows that failed before are not tried again, so that each of them is reported once and not in every epoch.
        untried = [row for row in rows if row.row not in self._bad_rows]
        if self._pool is None:
            loaded = [self._load_part(untried, resolutions)]
        else:
            bounds = [len(untried) * part // self._threads for part in range(self._threads + 1)]
            parts = [untried[start:stop] for start, stop in pairwise(bounds)]
            loaded = list(self._pool.map(self._load_part, parts, repeat(resolutions)))
        good = [row for part in loaded for row in part.rows]
        decoded = {row.row for row in good}
        bad = {row.row: row.label for row in untried if row.row not in decoded}
        self._bad_rows.update(bad)
        self._count_lost(bad.values())
        if len(self._bad_rows) == self.table.num_rows:
            raise DataError(
                f"{self.table.uri}: found no image that can be decoded in {self.table.num_rows} rows, expected PNG, "
                "JPEG, WebP or GIF. Check that the column 'image' contains whole encoded files, and write the table "
                "anew."
            )
        if len(loaded) == 1:
            return Loaded(good, loaded[0].pixels)
        return Loaded(good, {size: torch.cat([part.pixels[size] for part in loaded]) for size in resolutions})

    def _load_part(self, rows: Sequence[EncodedRow], resolutions: Sequence[int]) -> Loaded:
        """Load rows on the current thread."""
        good: list[EncodedRow] = []
        pixels = resize_images(self._images(rows, good), resolutions, len(rows))
        if self._augmentation is not None:
            for images_nhwc in pixels.values():
                self._augmentation.change(images_nhwc, [row.key for row in good])
        return Loaded(good, pixels)

    def _images(self, rows: Sequence[EncodedRow], good: list[EncodedRow]) -> Iterator[Tensor]:
        """Yield the pixels of each row that can be decoded, and append that row to `good`."""
        for row in rows:
            image_chw = self._decoded(row)
            if image_chw is None:
                continue
            if self._augmentation is not None:
                image_chw = self._augmentation.cut(image_chw, row.key)
            good.append(row)
            yield image_chw

    def _decoded(self, row: EncodedRow) -> Tensor | None:
        """Return the pixels of a row, or None if it cannot be decoded and such images are skipped."""
        try:
            return decode(row.image)
        except RuntimeError as error:
            source, reason = self.table.source(row.row), str(error).partition("\n")[0]
            if self._undecodable == "fail":
                raise DataError(
                    f"{source}: found an image that cannot be decoded ({reason}), expected a whole PNG, JPEG, WebP "
                    "or GIF. Replace it in the table, or set undecodable='skip' to count and skip such images."
                ) from error
            self._new_bad.append(f"{source}: the image cannot be decoded ({reason})")
            return None

    def _count_lost(self, labels: Collection[int]) -> None:
        """Count undecodable images, and report each class that has lost more than `MOST_LOST` of its images."""
        self._lost.update(labels)
        for label in set(labels):
            name, lost, rows = quoted(self.table.classes[label]), self._lost[label], self._rows_of_class[label]
            if lost > MOST_LOST * rows and label not in self._reported:
                self._reported.add(label)
                self._new_bad.append(
                    f"more than a tenth of class {name}: {lost} of its {rows} images cannot be decoded so far "
                    f"({self.table.uri})"
                )
            if lost == rows:
                self.lost_classes.append(name)

    @cached_property
    def _rows_of_class(self) -> list[int]:
        """Number of rows of each class. The labels of the table are read for it once an image cannot be decoded."""
        counts: list[int] = self.table.rows_of_class().tolist()
        return counts

    def found_bad(self, row: int) -> bool:
        """Return whether decoding a row of the table was tried and failed."""
        return row in self._bad_rows

    def take_bad(self) -> tuple[str, ...]:
        """Return what was found since the last call, a line each: undecodable images, with file, row and problem, and
        classes that have lost more than a tenth of their images."""
        # Balanced classes may read a bad row twice before it counts as one.
        taken, self._new_bad = tuple(dict.fromkeys(self._new_bad)), []
        return taken


def check_option(name: str, value: object, fits: bool, allowed: str) -> None:
    """Check one option of a reader.

    Args:
        name: name of the option.
        value: its value.
        fits: whether the value is allowed.
        allowed: description of the allowed values.
    Raises:
        ValueError: the value is not allowed.
    """
    if not fits:
        raise ValueError(f"{name} is {value!r}, but allowed is {allowed}. Change {name}.")
