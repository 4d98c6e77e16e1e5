"""Image tables on disk: a directory of Parquet shards and the index that describes them.

Each shard has the columns `image` (binary, an encoded PNG or JPEG) and `label` (int64, a position in the class list);
readers ignore further columns. Shards carry the format version and the class list in their schema metadata.
`index.json` is written last and lists what a reader should find: classes, counts, and rows, bytes and SHA-256 of
each shard.
"""

import hashlib
import json
import operator
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
IMAGE, LABEL = "image", "label"
VERSION_KEY, CLASSES_KEY = b"multitask.format", b"multitask.classes"
ROWS_PER_GROUP = 1024
"""Rows a reader must decompress together: small enough to stream large images, large enough to compress small ones."""


class DataError(ValueError):
    """A table or an image in it cannot be used: the message says what was expected, what was found, what to do."""


def shard_schema(classes: Sequence[str]) -> pa.Schema:
    """Arrow schema of every shard of a table with these classes."""
    metadata = {VERSION_KEY: str(FORMAT_VERSION), CLASSES_KEY: json.dumps(list(classes))}
    return pa.schema([pa.field(IMAGE, pa.binary()), pa.field(LABEL, pa.int64())], metadata=metadata)


def check_classes(classes: Sequence[str], where: str) -> tuple[str, ...]:
    """The class list as a tuple.

    Raises:
        DataError: the list is empty, has a name twice, or has an entry that is no text.
    """
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise DataError(f"{where}: classes are {classes!r}, expected a list of names. Give one string for each class.")
    if not classes or len(set(classes)) != len(classes):
        twice = sorted({name for name in classes if list(classes).count(name) > 1})
        found = f"{twice} more than once" if twice else "an empty class list"
        raise DataError(f"{where}: found {found}, expected one distinct name for each label. Correct the class list.")
    return tuple(classes)


def write_table(
    directory: str | os.PathLike[str],
    images: Iterable[tuple[bytes, int]],
    classes: Sequence[str],
    *,
    rows_per_shard: int = 8192,
    compression_level: int = 3,
) -> None:
    """Write a new table: all of it appears under `directory`, or nothing does.

    Equal input gives equal bytes. At most one shard is held in memory.

    Args:
        directory: local path that must not exist yet; its parents are made.
        images: encoded image and label for each row, in the order in which they are kept.
        classes: class names; label i means classes[i].
        rows_per_shard: rows of every shard but the last.
        compression_level: zstd level, 1 to 22.
    Raises:
        DataError: `directory` exists, there are no images, or a label or the class list does not fit.
    """
    target = Path(directory)
    class_names = check_classes(classes, str(target))
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard is {rows_per_shard}, but a shard holds at least 1 row. Give a larger number.")
    _refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    building.mkdir()
    try:
        rows_of_class = [0] * len(class_names)
        shards = []
        rows = iter(images)
        for number, first in enumerate(rows):
            table = _shard(chain([first], islice(rows, rows_per_shard - 1)), class_names, rows_of_class, target)
            shards.append(_write_shard(building / f"shard-{number:05d}.parquet", table, compression_level))
        if not shards:
            raise DataError(f"{target}: found zero images, expected at least one. Check where the images come from.")
        index = {
            "format": FORMAT_VERSION,
            "classes": class_names,
            "rows": sum(rows_of_class),
            "rows_of_class": rows_of_class,
            "shards": shards,
        }
        (building / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _sync(building / INDEX_NAME)
        _sync(building)
        _refuse_existing(target)
        building.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise DataError(
            f"{target} exists, and a table is only written to a new directory. Choose another one or remove it first."
        )


def _shard(rows: Iterator[tuple[bytes, int]], classes: Sequence[str], counts: list[int], target: Path) -> pa.Table:
    """Arrow table of the next rows; adds them to `counts`, the rows of each class so far."""
    images, labels = [], []
    for image, given in rows:
        label = operator.index(given)
        if not 0 <= label < len(classes):
            raise DataError(
                f"{target}: image {sum(counts)} has label {label}, but {len(classes)} classes allow "
                f"0 to {len(classes) - 1}. Correct the label or give the full class list."
            )
        counts[label] += 1
        images.append(image)
        labels.append(label)
    return pa.table({IMAGE: images, LABEL: labels}, schema=shard_schema(classes))


def _write_shard(path: Path, table: pa.Table, compression_level: int) -> dict[str, Any]:
    """Write one shard to stable storage and return its entry of the index."""
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=compression_level,
        row_group_size=ROWS_PER_GROUP,
        use_dictionary=[LABEL],
        write_statistics=[LABEL],
    )
    _sync(path)
    content = path.read_bytes()
    return {
        "file": path.name,
        "rows": table.num_rows,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
