"""Files of predictions: the answers of one model on the images of a table.

A file is a Parquet table with one row for each image and three columns: `row` (the number of the image in its table),
`label` (the right class) and `logits` (a list of floats, one for each class). If the metadata of its schema has the key
`multitask.classes`, this is the list of the class names in the order of the logits, as JSON.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from multitask.data.format import CLASSES_KEY
from patches.files import atomic_file

ROW, LABEL, LOGITS = "row", "label", "logits"

Write = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]], None]
"""Function that adds images to a file: rows (n,), labels (n,) and logits (n, classes)."""


@contextmanager
def predictions_writer(
    path: str | os.PathLike[str], classes: int, names: Sequence[str] | None = None
) -> Iterator[Write]:
    """Write a file of predictions. The file appears complete when the `with` block ends, or not at all if it fails.

    Args:
        path: the file.
        classes: number of classes.
        names: class names in the order of the logits. With them, readers match the classes of several models by name.
    Yields:
        A function that adds images to the file.
    """
    logits_type = pa.list_(pa.float32(), classes)
    metadata = {} if names is None else {CLASSES_KEY: json.dumps(list(names))}
    schema = pa.schema([(ROW, pa.int64()), (LABEL, pa.int64()), (LOGITS, logits_type)], metadata)
    with atomic_file(path) as file, pq.ParquetWriter(file, schema) as writer:

        def write(rows: NDArray[np.int64], labels: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
            column = pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1), pa.float32()), type=logits_type)
            writer.write_table(pa.table([rows, labels, column], schema))

        yield write
