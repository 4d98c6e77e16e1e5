"""Checks of labels and class lists, for all kinds of sources."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from multitask.data.classes import not_supported
from multitask.data.format import check_classes
from multitask.data.storage import DataError

MOST_UNNAMED_CLASSES = 100_000
"""Limit of labels without a class list. A label above it is probably a mistake, such as an identity number."""


def name_classes(labels: NDArray[np.int64], classes: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """Check every label, and return the class list.

    Args:
        labels: shape (rows,).
        classes: class names. None gives the numbers from 0 to the largest label as names.
        where: name of the data set in messages.
    Raises:
        DataError: there are no rows, the class list is invalid, or a label lies outside the class list.
    """
    if not len(labels):
        raise DataError(f"{where}: found zero images, expected at least one. Check the path.")
    limit = MOST_UNNAMED_CLASSES if classes is None else len(check_classes(classes, where))
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(wrong):
        raise DataError(
            f"{where}: image {wrong[0]} (counted from 0) and {len(wrong) - 1} more have labels such as "
            f"{labels[wrong[0]]}, expected 0 to {limit - 1}. Correct the labels or give the full class list; "
            "images without a label (-1) cannot be imported."
        )
    return tuple(map(str, range(int(labels.max()) + 1))) if classes is None else tuple(classes)


def read_labels(
    column: pa.ChunkedArray, classes: Sequence[str] | None, where: str
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return labels and class list, given an Arrow column of class numbers or class names.

    Args:
        column: shape (rows,), of any integer or string type, or a dictionary of one.
        classes: class names. None gives the sorted names if the column contains names, or else the numbers from 0 to
            the largest label as names.
        where: file and column in messages.
    Raises:
        DataError: an entry is missing, has another type, or is not in the class list.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if reason := not_supported(column.type):
        raise DataError(f"{where}: labels are of type {column.type}; {reason}")
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise DataError(f"{where}: row {row} has no label, expected one in every row. Fill it in or drop the row.")
    if pa.types.is_integer(column.type):
        labels = column.cast(pa.int64()).to_numpy()
        return labels, name_classes(labels, classes, where)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise DataError(
            f"{where}: labels are of type {column.type}, expected integers or strings. Name the column of the classes."
        )
    names = check_classes(sorted(pc.unique(column).to_pylist()) if classes is None else classes, where)
    numbers = pc.index_in(column, value_set=pa.array(names, column.type))
    if numbers.null_count:
        row = pc.index(numbers.is_null(), True).as_py()
        raise DataError(
            f"{where}: row {row} has label '{column[row].as_py()}', which is not among the {len(names)} given classes. "
            "Correct the label or add it to the class list."
        )
    labels = numbers.cast(pa.int64()).to_numpy()
    return labels, name_classes(labels, names, where)
