"""Files of answers: what a model says about images, a row for each image, as Parquet, CSV or JSON lines.

The columns are `file`, `task` (whose model answered), `class`, `probability` (of that class) and, for each class, its
probability. JSON lines have the latter as one mapping, `probabilities`.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from multitask.data.storage import DataError
from patches.files import atomic_file
from patches.prediction import Answer

COLUMNS = ("file", "task", "class", "probability")
ROW_GROUP = 4096
"""Number of rows that a Parquet file gets at a time."""

Write = Callable[[str, Answer], None]
"""Function that adds the answer for a file."""


@contextmanager
def answers_writer(path: Path, classes: Sequence[str]) -> Iterator[Write]:
    """Write a file of answers. It appears complete when the `with` block ends, or not at all if the block fails.

    Args:
        path: the file. It ends in .parquet, .csv or .jsonl.
        classes: class names in the order of the answers' probabilities.
    Raises:
        DataError: the path has another ending.
        OSError: the folder cannot be written.
    """
    check_ending(path)
    with atomic_file(path) as file, WRITERS[path.suffix](file, classes) as write:
        yield write


def check_ending(path: Path) -> None:
    """Check that a path has the ending of a file of answers.

    Raises:
        DataError: it has another one.
    """
    if path.suffix not in WRITERS:
        raise DataError(f"'{path}': expected a name that ends in {', '.join(WRITERS)}. Choose one of these formats.")


def answer_record(file: str, answer: Answer, classes: Sequence[str]) -> dict[str, Any]:
    """Return an answer as JSON holds it."""
    probabilities = dict(zip(classes, map(_shortest, answer.probabilities.tolist()), strict=True))
    values = (file, answer.task, answer.class_name, _shortest(answer.probability))
    return dict(zip(COLUMNS, values, strict=True)) | {"probabilities": probabilities}


@contextmanager
def _json_lines(file: BinaryIO, classes: Sequence[str]) -> Iterator[Write]:
    def write(name: str, answer: Answer) -> None:
        line = json.dumps(answer_record(name, answer, classes), ensure_ascii=False)
        file.write(f"{line}\n".encode())

    yield write


@contextmanager
def _csv(file: BinaryIO, classes: Sequence[str]) -> Iterator[Write]:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    table = csv.writer(text)
    table.writerow(_columns(classes))

    def write(name: str, answer: Answer) -> None:
        numbers = (answer.probability, *answer.probabilities.tolist())
        table.writerow((name, answer.task, answer.class_name, *map(_shortest, numbers)))

    try:
        yield write
    finally:
        text.detach()  # which writes what is left, and leaves the file open


@contextmanager
def _parquet(file: BinaryIO, classes: Sequence[str]) -> Iterator[Write]:
    texts, numbers = _columns(classes)[:3], _columns(classes)[3:]
    schema = pa.schema([(name, pa.string()) for name in texts] + [(name, pa.float32()) for name in numbers])
    waiting: list[tuple[str, Answer]] = []

    def write_waiting() -> None:
        rows = [(name, answer.task, answer.class_name) for name, answer in waiting]
        values = np.array([[answer.probability, *answer.probabilities.tolist()] for _, answer in waiting], np.float32)
        columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
        table.write_table(pa.table([*columns, *map(pa.array, values.T)], schema=schema))
        waiting.clear()

    def write(name: str, answer: Answer) -> None:
        waiting.append((name, answer))
        if len(waiting) == ROW_GROUP:
            write_waiting()

    with pq.ParquetWriter(file, schema) as table:
        yield write
        if waiting:
            write_waiting()


WRITERS: dict[str, Callable[[BinaryIO, Sequence[str]], AbstractContextManager[Write]]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".jsonl": _json_lines,
}
"""Ending of a file -> what writes it."""


def _columns(classes: Sequence[str]) -> list[str]:
    # With the words before the name, a class that is called "file" is no second column of that name.
    return [*COLUMNS, *(f"probability of {name}" for name in classes)]


def _shortest(probability: float) -> float:
    """Return a float32 value as the number with the fewest digits that float32 rounds to it: 0.9 for 0.89999998."""
    return float(str(np.float32(probability)))
