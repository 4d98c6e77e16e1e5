"""Tables of predictions: what each model of a pool answered on the same labelled images.

One Parquet file per model, named after it, with the columns `row` (an integer or a string that names the image),
`label` (integer) and `logits` (a list of floats, one for each class). `multitask evaluate --save-predictions` writes
them; any other program may.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from multitask.cascade.errors import CascadeError
from multitask.data.predictions import LABEL, LOGITS, ROW
from patches.names import unknown_name_message

SHOWN = 3
"""Rows that a message names."""


@dataclass(frozen=True)
class Predictions:
    """Logits of a pool of models on the same images."""

    rows: NDArray[Any]
    """Shape (n,): what names each image, integers or strings."""
    labels: NDArray[np.int64]
    """Shape (n,): the right classes."""
    logits: Mapping[str, NDArray[np.float32]]
    """Model -> shape (n, classes)."""

    def __post_init__(self) -> None:
        if not self.logits or not len(self.labels):
            raise CascadeError("Found predictions of no model or no image, expected one or more of both.")
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
        return next(iter(self.logits.values())).shape[1]

    def right(self, model: str) -> NDArray[np.bool_]:
        """Shape (n,): whether the model's answer is the label."""
        return self.logits[model].argmax(axis=1) == self.labels

    def take(self, places: NDArray[np.int64]) -> "Predictions":
        """The images at these places."""
        logits = {model: logits[places] for model, logits in self.logits.items()}
        return Predictions(self.rows[places], self.labels[places], logits)

    def only(self, models: Sequence[str]) -> "Predictions":
        """The same images, fewer models.

        Raises:
            CascadeError: a model that is not there.
        """
        for model in models:
            if model not in self.logits:
                raise CascadeError(unknown_name_message("model of these predictions", model, self.logits))
        return Predictions(self.rows, self.labels, {model: self.logits[model] for model in models})

    def halves(self, seed: int) -> tuple["Predictions", "Predictions"]:
        """Two random halves: one to fit on, one that stays untouched."""
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(np.sort(order[: len(self) // 2])), self.take(np.sort(order[len(self) // 2 :]))

    def fingerprints(self, model: str, places: Iterable[int]) -> list[str]:
        """Of each image at these places: tells whether an image of one table, with a model's logits, is in another."""
        logits = np.ascontiguousarray(self.logits[model])
        return [
            hashlib.sha256(f"{self.rows[place]} {self.labels[place]} ".encode() + logits[place].tobytes()).hexdigest()[
                :16
            ]
            for place in places
        ]


def read_predictions(folder: str | os.PathLike[str], models: Sequence[str] | None = None) -> Predictions:
    """Read the Parquet files of a folder, one for each model, and put their rows in one order.

    Args:
        models: those to read; all by default.
    Raises:
        CascadeError: no such file, a column that is missing or of another type, or files about different images.
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
    first = next(iter(tables))
    rows, labels, _ = tables[first]
    for model, (other_rows, other_labels, _) in tables.items():
        if not np.array_equal(rows, other_rows):
            lone = np.setxor1d(rows.astype(str), other_rows.astype(str))
            raise CascadeError(
                f"'{files[model]}' and '{files[first]}': expected the same rows, found {len(lone)} that only one of "
                f"them has, such as {', '.join(lone[:SHOWN])}. Evaluate both models on the same split of the same data."
            )
        wrong = np.flatnonzero(labels != other_labels)
        if len(wrong):
            raise CascadeError(
                f"'{files[model]}' and '{files[first]}': expected the same labels, found {other_labels[wrong[0]]} and "
                f"{labels[wrong[0]]} for row {rows[wrong[0]]} ({len(wrong)} such rows). Evaluate both models on the "
                "same split of the same data."
            )
    return Predictions(rows, labels, {model: logits for model, (_, _, logits) in tables.items()})


def _read(path: Path) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.float32]]:
    """Rows, labels and logits of a file, in the order of the rows."""
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
    in_order = bool((np.diff(order) == 1).all())  # as this project writes them: no second copy of the logits
    return names, labels.to_numpy().astype(np.int64)[order], logits if in_order else logits[order]


def _column(table: pa.Table, path: Path, name: str, fits: Callable[[pa.DataType], bool], expected: str) -> pa.Array:
    found = table[name].type if name in table.column_names else "no such column"
    if name not in table.column_names or not fits(found):
        raise CascadeError(
            f"'{path}': found {found} as column '{name}', expected {expected}. The columns of predictions are {ROW}, "
            f"{LABEL} and {LOGITS}."
        )
    if table[name].null_count:
        raise CascadeError(f"'{path}': found {table[name].null_count} rows without {name}, expected one in each row.")
    return table[name].combine_chunks()


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_floats(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and pa.types.is_floating(kind.value_type)
