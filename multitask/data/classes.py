"""Class lists, and labels that are no classes. Two lists of the same names are matched by name, in whatever order."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from multitask.data.storage import DataError
from patches.quoting import shortened

NAMES, CHARACTERS = 4, 20
"""Largest number of names of a class list that a message shows, and largest number of characters of each."""
MULTI_LABEL = (
    "multi-label is not supported: each image has exactly one class. Make a task of each label, with a label column of "
    "its own."
)
REGRESSION = (
    "regression is not supported: each image has a class. Divide the numbers into ranges, and make each range a class. "
    "If they are class numbers, write them as integers."
)
"""What messages say about labels that are lists, or numbers with a fraction."""


def not_supported(labels: pa.DataType) -> str | None:
    """Return why labels of a type cannot be classes, as a sentence; None for any other type."""
    if pa.types.is_list(labels) or pa.types.is_large_list(labels) or pa.types.is_fixed_size_list(labels):
        return MULTI_LABEL
    return REGRESSION if pa.types.is_floating(labels) or pa.types.is_decimal(labels) else None


def positions(names: Sequence[str], classes: Sequence[str], where: str) -> NDArray[np.int64]:
    """Return where each name is in a class list, shape (len(names),).

    Args:
        names: names without repetition. Some classes may be missing among them.
        classes: the class list.
        where: what has the names, for messages.
    Raises:
        DataError: a name is not in the class list.
    """
    place = {name: number for number, name in enumerate(classes)}
    unknown = [name for name in names if name not in place]
    if unknown:
        raise DataError(
            f"{where}: found {shown(unknown)}, which the model does not know: the classes there are {shown(names)}, "
            f"and those of the model are {shown(classes)}. Rename the classes, or use a model that was trained on them."
        )
    return np.array([place[name] for name in names], dtype=np.int64)


def shown(names: Sequence[str], other: Sequence[str] = ()) -> str:
    """Return a class list for a message: the beginnings of the first names, and the number of the others.

    Args:
        other: another class list that the message shows. The names that it lacks come first.
    """
    first = sorted(names, key=set(other).__contains__)[:NAMES]
    texts = [shortened(repr(name), CHARACTERS) for name in first]
    return ", ".join(texts) + (f" and {len(names) - NAMES} more" if len(names) > NAMES else "")
