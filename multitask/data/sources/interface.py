"""What every kind of data set becomes before it is written to a table of ours."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


class Source(Protocol):
    """Encoded images and labels of a data set as it lies on disk, in a fixed order.

    Picklable: Ray tasks read parts of it. What grows with the rows is held in Arrow and numpy buffers, so that two
    million rows travel without being copied.
    """

    @property
    def name(self) -> str:
        """Short name of the origin: the folder's, the list file's or the data set's."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; label i means classes[i]."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Shape (rows,): positions in `classes`."""

    @property
    def ids(self) -> pa.Array:
        """pa.string(), shape (rows,): unique in this source, and the same on every machine."""

    def read(self, rows: Sequence[int]) -> Iterator[bytes]:
        """Encoded images of these rows, in this order, with their bytes exactly as stored.

        Args:
            rows: positions, 0 to len(labels) - 1, in any order; a few thousand at most.
        Raises:
            DataError: an image is gone, empty or cut short; the message names its id and its file.
        """
