"""Files of predictions: what a model answered on the images of a table."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from patches.files import atomic_file

ROW, LABEL, LOGITS = "row", "label", "logits"

Write = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]], None]
"""Adds rows (n,), labels (n,) and logits (n, classes) to a file."""


@contextmanager
def predictions_writer(path: str | os.PathLike[str], classes: int) -> Iterator[Write]:
    """A function that adds images to a model's file, which is there, whole, when the block ends."""
    logits_type = pa.list_(pa.float32(), classes)
    schema = pa.schema([(ROW, pa.int64()), (LABEL, pa.int64()), (LOGITS, logits_type)])
    with atomic_file(path) as file, pq.ParquetWriter(file, schema) as writer:

        def write(rows: NDArray[np.int64], labels: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
            column = pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1), pa.float32()), type=logits_type)
            writer.write_table(pa.table([rows, labels, column], schema))

        yield write
