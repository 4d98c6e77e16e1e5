"""Labels and class lists: the checks that all kinds of sources share."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from multitask.data.format import DataError, check_classes

MOST_UNNAMED_CLASSES = 100_000
"""Without a class list a larger label is taken for a mistake, such as an identity number, and not for a class."""


def name_classes(labels: NDArray[np.int64], classes: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """The class list after a check of every label; without a list, the numbers 0 to the largest label as text.

    Args:
        labels: shape (rows,).
        classes: class names, or None.
        where: what the labels belong to, for the message.
    Raises:
        DataError: there are no rows, the class list is wrong, or a label is outside of it.
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
    """Labels and class list from an Arrow column of class numbers or of class names.

    Args:
        column: shape (rows,), of any integer or string type, or a dictionary of these.
        classes: class names. Without them: sorted names where the column holds names, else numbers as text.
        where: file and column, for the message.
    Raises:
        DataError: an entry is missing, of another type, or not in the class list.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
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
