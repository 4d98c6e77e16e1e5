"""The interface that the importer reads every kind of data set through."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


class Source(Protocol):
    """The encoded images and the labels of a data set on disk, in a fixed order.

    A source can be pickled, because Ray tasks read parts of it. Everything that grows with the number of rows is stored
    in Arrow and NumPy buffers, so that two million rows pass to other processes without a copy.
    """

    @property
    def name(self) -> str:
        """Short name of the data set: the name of its folder, of its list file, or its own name."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names. Label i means `classes[i]`."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Position of each row's class in `classes`, shape (rows,)."""

    @property
    def ids(self) -> pa.Array:
        """Name of each image, of type pa.string(), shape (rows,): unique in the source, and equal on every machine."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know before the import: what is left aside, or stored in another form. Sentences."""

    def read(self, rows: Sequence[int]) -> Iterator[bytes]:
        """Yield the encoded images of some rows, in the given order, with exactly the bytes that are stored.

        Args:
            rows: row numbers, 0 to len(labels) - 1, in any order, at most a few thousand.
        Raises:
            DataError: an image is missing, empty or incomplete. The message names its id and its file.
        """
