"""The training stream of one worker: endless batches of decoded images, in the order that `order.py` defines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from multitask.data.augmentation import Augment, Augmentation
from multitask.data.feature_cache import FeatureCache
from multitask.data.loading import ImageLoader, Loaded, Undecodable, check_option
from multitask.data.order import EpochOrder
from multitask.data.storage import DataError
from multitask.data.table import ImageTable
from multitask.data.windows import WindowReader

Sampling = Literal["natural", "balanced"]
"""How often a row comes in an epoch: once, or so often that all classes have the same number of rows."""
SHUFFLE_WINDOW = 4096
"""Default number of rows that are shuffled together."""


@dataclass(frozen=True)
class Drawn:
    """One batch at one or several resolutions. NumPy arrays pass between processes on one node without a copy."""

    pixels: dict[int, NDArray[np.uint8]]
    """Resolution -> shape (batch, resolution, resolution, 3), the memory order of the decoder and of channels_last
    models. Empty if the batch has stored features in place of images."""
    labels: NDArray[np.int64]
    """Shape (batch,)."""
    rows: NDArray[np.int64]
    """Shape (batch,): number of each image in the table."""
    skipped: int
    """Number of undecodable images that were skipped while this batch was gathered."""
    bad_images: tuple[str, ...] = ()
    """The skipped images that were met for the first time: file, row, and what is wrong."""
    position: int = 0
    """Number of rows of the stream that the worker has consumed, this batch included."""
    features: Mapping[int, Tensor] | None = None
    """Step of the backbone -> its stored output for the images, or None if not all of them are stored."""


class TrainStream:
    """The decoded images of one worker, as endless batches of one size. A batch may contain the end of an epoch.

    At most two windows of encoded images are in memory: the current one, and the next one, which is fetched meanwhile.
    """

    def __init__(
        self,
        table: ImageTable,
        *,
        batch_size: int,
        seed: int,
        augment: Augment | Sequence[Augment] = "none",
        sampling: Sampling = "natural",
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
        table: the images.
        batch_size: number of images in each batch. It may exceed the number of rows of the table.
        seed: 0 or more. All workers of a task use the same seed.
        augment: one or several random changes of the images, which seed, epoch and row determine.
        sampling: "natural" reads each row once in an epoch. "balanced" reads the rows of rare classes more often and
            those of frequent classes less often (`draw_readings` in `order.py`). An epoch has the same length in both.
        rank: number of this worker, 0 to `workers` - 1.
        workers: number of workers that share the table.
        undecodable: what happens to an image that cannot be decoded: "fail" raises an error, "skip" counts it.
        window: number of rows that are shuffled together.
        threads: number of threads that decode. It changes no value.
        start: `position` of an earlier stream or batch. This stream continues from there with the same bits.
        cache: stored features of the table's images. A batch whose images are all stored carries their features.
        decode_cached: decode the images of such a batch too.
        """
        check_option("batch_size", batch_size, batch_size >= 1, "1 or more")
        changes: tuple[Augment, ...] = (augment,) if isinstance(augment, str) else tuple(augment)
        known = get_args(Augment)
        check_option("augment", augment, set(changes) <= set(known), f"one or several of {list(known)}")
        choices = list(get_args(Sampling))
        check_option("sampling", sampling, sampling in choices, f"one of {choices}")
        check_option("seed", seed, seed >= 0, "0 or more")
        check_option("workers", workers, 1 <= workers <= table.num_rows, f"1 to {table.num_rows}, the table's rows")
        check_option("rank", rank, 0 <= rank < workers, f"0 to {workers - 1} with {workers} worker(s)")
        check_option("window", window, window >= 1, "1 or more")
        check_option("start", start, start >= 0, "0 or more")
        self.position = start
        """Number of rows consumed so far, skipped ones included."""
        self._batch_size = batch_size
        labels = table.labels() if sampling == "balanced" else None
        self._order = EpochOrder(table.group_rows, seed=seed, rank=rank, workers=workers, window=window, labels=labels)
        self.rows_per_epoch = self._order.rows_per_epoch
        """Number of rows that this worker consumes in one epoch."""
        self._loader = ImageLoader(
            table, undecodable=undecodable, augmentation=Augmentation(changes, seed), threads=threads
        )
        self._windows = WindowReader(table, self._order)
        self._cache, self._decode_cached = cache, decode_cached

    def draw(self, resolutions: Sequence[int]) -> Drawn:
        """Return the next batch at each resolution, or its stored features alone if images are not needed for it.

        Raises:
            DataError: an image cannot be decoded and `undecodable` is "fail", no image of a class can be decoded, or a
                shard cannot be read.
        """
        if self._cache is None:
            return self._draw_decoded(resolutions)
        if not self._decode_cached:
            drawn = self._draw_stored(self._cache)
            return self._draw_decoded(resolutions) if drawn is None else drawn
        drawn = self._draw_decoded(resolutions)
        found = self._cache.read(drawn.rows)
        return drawn if found is None else replace(drawn, features=found[1])

    def _draw_stored(self, cache: FeatureCache) -> Drawn | None:
        """Return the next batch from the cache without reading the table, or None if the cache lacks an image."""
        ahead = 0
        rows: list[int] = []
        while len(rows) < self._batch_size:
            row = self._windows.table_row(*self._order.place(self.position + ahead))
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

    def _draw_decoded(self, resolutions: Sequence[int]) -> Drawn:
        """Return the next batch with decoded images."""
        parts: list[Loaded] = []
        wanted, skipped = self._batch_size, 0
        while wanted:
            # Load exactly the rows that the batch still lacks, so that it ends at the same row as if the rows had been
            # loaded one by one.
            rows = [self._windows.row(*self._order.place(self.position + ahead)) for ahead in range(wanted)]
            self.position += len(rows)
            parts.append(self._loader.load(rows, resolutions))
            good = len(parts[-1].rows)
            wanted -= good
            skipped += len(rows) - good
        if self._loader.lost_classes:
            raise DataError(
                f"{self._loader.table.uri}: found no image that can be decoded of class "
                f"{', '.join(self._loader.lost_classes[:3])}, expected some, because training would not learn it. "
                "Replace the images and import them again, or import the data without this class."
            )
        return replace(join_parts(parts, skipped), bad_images=self._loader.take_bad(), position=self.position)


def join_parts(parts: Sequence[Loaded], skipped: int) -> Drawn:
    """Join images that were loaded part by part into one batch.

    Args:
        parts: at least one part.
        skipped: number of images that were skipped.
    """
    labels = np.array([row.label for part in parts for row in part.rows], dtype=np.int64)
    rows = np.array([row.row for part in parts for row in part.rows], dtype=np.int64)
    if len(parts) == 1:  # the usual case needs no copy
        pixels = parts[0].pixels
    else:
        pixels = {size: torch.cat([part.pixels[size] for part in parts]) for size in parts[0].pixels}
    arrays = {size: images.numpy() for size, images in pixels.items()}
    return Drawn(arrays, labels, rows, skipped)
