"""Reading the predictions of a pool of models: their answers on the same labelled images.

A folder contains one Parquet file for each model, named after the model, with the columns of
`multitask/data/predictions.py`. `multitask evaluate --save-predictions` writes these files. Files of other programs are
read too, and their `row` may be an integer or a string, as long as it identifies the image. Where files have class
names, the classes of the models are matched by name.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from multitask.cascade.classes import common_classes
from multitask.cascade.errors import CascadeError
from multitask.data.format import CLASSES_KEY
from multitask.data.predictions import LABEL, LOGITS, ROW
from patches.names import unknown_name_message

SHOWN = 3
"""Largest number of rows that a message names."""


@dataclass(frozen=True)
class Predictions:
    """Logits of a pool of models on the same n images."""

    rows: NDArray[Any]
    """Identifies each image: integers or strings, shape (n,)."""
    labels: NDArray[np.int64]
    """Right class of each image, shape (n,)."""
    logits: Mapping[str, NDArray[np.float32]]
    """Model -> its logits, shape (n, classes)."""
    names: tuple[str, ...] | None = None
    """Class names in the order of the labels and the logits, or None if they are unknown."""

    def __post_init__(self) -> None:
        if not self.logits or not len(self.labels):
            raise CascadeError(
                "Found predictions of no model or no image, expected one or more of both. Evaluate a model first."
            )
        shapes = {model: logits.shape for model, logits in self.logits.items()}
        first = next(iter(self.logits))
        for model, logits in self.logits.items():
            if shapes[model] != shapes[first] or len(logits) != len(self.labels) or logits.shape[1] < 2:
                raise CascadeError(
                    f"Model '{model}': found logits of shape {shapes[model]}, expected {len(self.labels)} images and "
                    f"as many classes as model '{first}' has, {shapes[first][1]}, at least 2. Give models that answer "
                    "the same question."
                )
            wrong = np.flatnonzero(~np.isfinite(logits).all(axis=1))
            if len(wrong):
                raise CascadeError(
                    f"Model '{model}': found {len(wrong)} rows with logits that are not finite, such as row "
                    f"{self.rows[wrong[0]]}. Evaluate the model again."
                )
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= self.classes))
        if len(wrong):
            raise CascadeError(
                f"Row {self.rows[wrong[0]]}: found label {self.labels[wrong[0]]}, but {self.classes} classes allow 0 "
                f"to {self.classes - 1} ({len(wrong)} such rows). Correct the labels."
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return next(iter(self.logits.values())).shape[1]

    def right(self, model: str) -> NDArray[np.bool_]:
        """Return whether each answer of the model is right, shape (n,)."""
        return self.logits[model].argmax(axis=1) == self.labels

    def take(self, places: NDArray[np.int64]) -> "Predictions":
        """Return the predictions for the images at these positions."""
        logits = {model: logits[places] for model, logits in self.logits.items()}
        return replace(self, rows=self.rows[places], labels=self.labels[places], logits=logits)

    def only(self, models: Sequence[str]) -> "Predictions":
        """Return the predictions of some of the models.

        Raises:
            CascadeError: a model is not among these predictions.
        """
        for model in models:
            if model not in self.logits:
                raise CascadeError(unknown_name_message("model of these predictions", model, self.logits))
        return replace(self, logits={model: self.logits[model] for model in models})

    def halves(self, seed: int) -> tuple["Predictions", "Predictions"]:
        """Divide the images at random into two halves: one to fit on, and one to check on."""
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(np.sort(order[: len(self) // 2])), self.take(np.sort(order[len(self) // 2 :]))

    def fingerprints(self, model: str, places: Iterable[int]) -> list[str]:
        """Return a hash for each image at these positions, by which the image is recognised in other predictions.

        The hash is over the row, the label and the logits of one model.
        """
        logits = np.ascontiguousarray(self.logits[model])
        contents = (f"{self.rows[place]} {self.labels[place]} ".encode() + logits[place].tobytes() for place in places)
        return [hashlib.sha256(content).hexdigest()[:16] for content in contents]


def read_predictions(folder: str | os.PathLike[str], models: Sequence[str] | None = None) -> Predictions:
    """Read the Parquet files of a folder, one for each model, and sort their rows.

    Args:
        folder: the folder.
        models: models to read. None means all of them.
    Raises:
        CascadeError: a file is missing, a column is missing or has another type, or the files are about different
            images or different classes.
    """
    files = {path.stem: path for path in sorted(Path(folder).glob("*.parquet"))}
    if not files:
        raise CascadeError(
            f"'{folder}' holds no predictions, expected a Parquet file for each model. Write them with `multitask "
            "evaluate RUN --save-predictions FOLDER`."
        )
    for model in models or ():
        if model not in files:
            raise CascadeError(unknown_name_message(f"model in '{folder}'", model, files))
    tables = {model: _read(path) for model, path in files.items() if models is None or model in models}
    names, columns = common_classes({model: table.names for model, table in tables.items()})
    for model, order in columns.items():
        tables[model] = tables[model].reordered(order)
    first_model, first = next(iter(tables.items()))
    for model, table in tables.items():
        _check_same_images(table, first, f"'{files[model]}' and '{files[first_model]}'")
    return Predictions(first.rows, first.labels, {model: table.logits for model, table in tables.items()}, names)


class _Table(NamedTuple):
    """The content of one file, sorted by row."""

    rows: NDArray[Any]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32]
    names: tuple[str, ...] | None
    """Class names of the file, in the order of its logits."""

    def reordered(self, columns: NDArray[np.int64]) -> "_Table":
        """Return the content with its classes in another order: the old places of the classes, shape (classes,)."""
        labels, known = self.labels.copy(), (self.labels >= 0) & (self.labels < len(columns))
        labels[known] = np.argsort(columns)[labels[known]]
        return self._replace(labels=labels, logits=self.logits[:, columns])


def _check_same_images(one: _Table, other: _Table, where: str) -> None:
    """Check that two files have the same rows with the same labels.

    Raises:
        CascadeError: they differ. The message starts with `where`, the names of the files.
    """
    if not np.array_equal(one.rows, other.rows):
        lone = np.setxor1d(other.rows.astype(str), one.rows.astype(str))
        raise CascadeError(
            f"{where}: expected the same rows, found {len(lone)} that only one of them has, such as "
            f"{', '.join(lone[:SHOWN])}. Evaluate both models on the same split of the same data."
        )
    wrong = np.flatnonzero(one.labels != other.labels)
    if len(wrong):
        place = wrong[0]
        raise CascadeError(
            f"{where}: expected the same labels, found {one.labels[place]} and {other.labels[place]} for row "
            f"{one.rows[place]} ({len(wrong)} such rows). Evaluate both models on the same split of the same data."
        )


def _read(path: Path) -> _Table:
    """Read one file and sort its rows.

    Raises:
        CascadeError: a column is missing or has another type, a value is missing, or a row comes twice.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise CascadeError(f"'{path}': cannot be read as Parquet ({error}). Evaluate the model again.") from error
    rows = _column(table, path, ROW, lambda kind: pa.types.is_integer(kind) or _is_text(kind), "integers or strings")
    labels = _column(table, path, LABEL, pa.types.is_integer, "integers")
    column = _column(table, path, LOGITS, _is_floats, "lists of floats")
    lengths = np.unique(column.value_lengths().to_numpy())
    if len(lengths) > 1:
        raise CascadeError(
            f"'{path}': found logits of {lengths[0]} and of {lengths[-1]} classes, expected one number of classes in "
            "all rows. Evaluate the model again."
        )
    logits = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(len(rows), -1)
    names = np.array(rows.to_pylist()) if _is_text(rows.type) else rows.to_numpy()
    order = np.argsort(names, kind="stable")
    names = names[order]
    twice = np.flatnonzero(names[1:] == names[:-1])
    if len(twice):
        raise CascadeError(
            f"'{path}': found row {names[twice[0]]} more than once ({len(twice)} such rows), expected each image once. "
            "Evaluate the model again."
        )
    in_order = bool((np.diff(order) == 1).all())  # then the logits need no second copy in memory
    labels_in_order = labels.to_numpy().astype(np.int64)[order]
    return _Table(names, labels_in_order, logits if in_order else logits[order], _class_names(table, path, logits))


def _class_names(table: pa.Table, path: Path, logits: NDArray[np.float32]) -> tuple[str, ...] | None:
    """Return the class names in a file's metadata, or None if it has none.

    Raises:
        CascadeError: the metadata is not a list with a distinct name for each of the logits.
    """
    text = (table.schema.metadata or {}).get(CLASSES_KEY)
    if text is None:
        return None
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    classes = logits.shape[1]
    if not (
        isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and len({*names}) == len(names) == classes
    ):
        raise CascadeError(
            f"'{path}': expected {classes} distinct class names in the metadata of its schema, found "
            f"{text[:80]!r}. Evaluate the model again."
        )
    return tuple(names)


def _column(table: pa.Table, path: Path, name: str, fits: Callable[[pa.DataType], bool], expected: str) -> pa.Array:
    """Return a column of a file.

    Args:
        table: content of the file.
        path: the file, for messages.
        name: name of the column.
        fits: returns whether a type is allowed.
        expected: description of the allowed types.
    Raises:
        CascadeError: the column is missing, has another type, or lacks a value.
    """
    found = table[name].type if name in table.column_names else "no such column"
    if name not in table.column_names or not fits(found):
        raise CascadeError(
            f"'{path}': found {found} as column '{name}', expected {expected}. The columns of predictions are {ROW}, "
            f"{LABEL} and {LOGITS}."
        )
    if table[name].null_count:
        raise CascadeError(
            f"'{path}': found {table[name].null_count} rows without {name}, expected one in each row. "
            "Evaluate the model again."
        )
    return table[name].combine_chunks()


def _is_text(kind: pa.DataType) -> bool:
    """Return whether a column type is one of strings."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_floats(kind: pa.DataType) -> bool:
    """Return whether a column type is one of lists of floats."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and pa.types.is_floating(kind.value_type)
