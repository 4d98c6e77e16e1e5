"""The format of image tables on disk, and how a table is written.

A table is a directory of Parquet files, called shards, and an index that describes them. A shard has four columns:
`image` (binary: the bytes of an encoded image file), `label` (int64: a position in the class list), `id` (string or
null: the name of the image in the data set that it came from) and `source` (string or null: the name of that data
set). Readers need `image` and `label`, and ignore any further columns. The schema metadata of each shard carries the
format version and the class list.

`index.json` is written last. A directory without it is not a table. The index lists the classes, the number of rows of
each class, and the rows, bytes, SHA-256 and row groups of each shard.
"""

import json
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from multitask.data.storage import DataError, Location, locate
from patches.quoting import quoted

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
IMAGE, LABEL, ID, SOURCE = "image", "label", "id", "source"
VERSION_KEY, CLASSES_KEY = b"multitask.format", b"multitask.classes"
"""Keys of the schema metadata."""
ROWS_PER_SHARD = 4096
"""Default number of rows in a shard."""
ROWS_PER_GROUP, BYTES_PER_GROUP = 1024, 1 << 23
"""Limits of a row group: it ends as soon as it reaches one of them. Readers always fetch a whole row group. Many small
images in one row group compress well, and the limit in bytes keeps row groups of large images small."""


class Row(NamedTuple):
    """One image of a table."""

    image: bytes
    """Bytes of the encoded image file."""
    label: int
    """Position of the image's class in the class list."""
    id: str | None = None
    """Name of the image in the data set that it came from."""


def shard_schema(classes: Sequence[str]) -> pa.Schema:
    """Return the Arrow schema of every shard of a table with these classes."""
    metadata = {VERSION_KEY: str(FORMAT_VERSION), CLASSES_KEY: json.dumps(list(classes))}
    fields = [(IMAGE, pa.binary()), (LABEL, pa.int64()), (ID, pa.string()), (SOURCE, pa.string())]
    return pa.schema([pa.field(*field) for field in fields], metadata=metadata)


def check_classes(classes: Sequence[str], where: str) -> tuple[str, ...]:
    """Check a class list and return it as a tuple.

    Args:
        classes: class names.
        where: name of the data set or file in messages.
    Raises:
        DataError: the list is empty, contains a name twice, or contains an entry that is not text.
    """
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise DataError(
            f"{where}: classes are {quoted(classes)}, expected a list of names. Give one string for each class."
        )
    for name in classes:
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise DataError(
                f"{where}: found class name {quoted(name)}, which has a half of a character (a surrogate), expected "
                "text that UTF-8 can write. Correct the class list."
            )
    if not classes or len(set(classes)) != len(classes):
        twice = sorted({name for name in classes if list(classes).count(name) > 1})
        found = f"{quoted(twice)} more than once" if twice else "an empty class list"
        raise DataError(f"{where}: found {found}, expected one distinct name for each label. Correct the class list.")
    return tuple(classes)


def write_table(
    directory: str | os.PathLike[str],
    images: Iterable[tuple[bytes, int] | Row],
    classes: Sequence[str],
    *,
    rows_per_shard: int = ROWS_PER_SHARD,
    compression_level: int = 3,
) -> None:
    """Write a new table. If writing fails, the directory is removed again.

    Equal input gives equal bytes. At most one row group is held in memory.

    Args:
        directory: local path or URI, which must not exist yet.
        images: the rows in the order in which they are stored. A row is `(encoded image, label)` or
            `(encoded image, label, id)`.
        classes: class names. Label i means `classes[i]`.
        rows_per_shard: number of rows in every shard except the last one.
        compression_level: zstd level, 1 to 22.
    Raises:
        DataError: `directory` exists, there are no images, a label lies outside the class list, or the class list is
            invalid.
        ValueError: `rows_per_shard` is below 1.
    """
    target = locate(directory)
    names = check_classes(classes, target.where)
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard is {rows_per_shard}, but a shard holds at least 1 row. Give a larger number.")
    refuse_existing(target)
    rows = (Row(*row) for row in images)
    shards: list[dict[str, Any]] = []
    try:
        for number, first in enumerate(rows):
            shard = chain([first], islice(rows, rows_per_shard - 1))
            shards.append(write_shard(target, number, shard, names, compression_level=compression_level))
        write_index(target, names, shards)
    except BaseException:
        if target.exists():
            target.remove()
        raise


def refuse_existing(target: Location) -> None:
    """Check that nothing exists at `target`, because a table is only written to a new directory.

    Raises:
        DataError: `target` exists.
    """
    if target.exists():
        raise DataError(
            f"{target.where} exists, and a table is only written to a new directory. Choose another one or remove it "
            "first."
        )


def write_shard(
    target: Location,
    number: int,
    rows: Iterable[Row],
    classes: Sequence[str],
    *,
    source: str | None = None,
    compression_level: int = 3,
) -> dict[str, Any]:
    """Write one shard.

    Args:
        target: directory of the table.
        number: number of the shard, from 0.
        rows: at least one row.
        classes: class names of the table.
        source: name of the data set that the images come from.
        compression_level: zstd level, 1 to 22.
    Returns:
        The shard's entry for the index, and in addition `rows_of_class`: the number of rows of each class.
    Raises:
        DataError: a label lies outside the class list.
    """
    file = f"shard-{number:05d}.parquet"
    groups: list[int] = []
    rows_of_class = [0] * len(classes)
    with target.writing(file) as sink:
        with pq.ParquetWriter(
            pa.PythonFile(sink, mode="w"),
            shard_schema(classes),
            compression="zstd",
            compression_level=compression_level,
            use_dictionary=[LABEL, SOURCE],
            write_statistics=[LABEL],
            write_page_checksum=True,
        ) as writer:
            for group in _groups(rows):
                for row in group:
                    where = f"{target.where}: row {sum(rows_of_class)} of shard {number}"
                    rows_of_class[_checked_label(row.label, len(classes), where)] += 1
                images, labels, ids = zip(*group, strict=True)
                columns = {IMAGE: images, LABEL: labels, ID: ids, SOURCE: [source] * len(group)}
                table = pa.table(columns, schema=shard_schema(classes))
                writer.write_table(table, row_group_size=len(group))
                groups.append(len(group))
        return {
            "file": file,
            "rows": sum(groups),
            "bytes": sink.bytes,
            "sha256": sink.hexdigest(),
            "groups": groups,
            "rows_of_class": rows_of_class,
        }


def _checked_label(label: int, classes: int, where: str) -> int:
    """Return the label as a plain integer.

    Raises:
        DataError: the label is below 0, or `classes` or above.
    """
    number = operator.index(label)
    if not 0 <= number < classes:
        raise DataError(
            f"{where} has label {number}, but {classes} classes allow 0 to {classes - 1}. Correct the label or give "
            "the full class list."
        )
    return number


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Divide rows into row groups, each within `ROWS_PER_GROUP` and `BYTES_PER_GROUP`."""
    group: list[Row] = []
    size = 0
    for row in rows:
        if group and (len(group) == ROWS_PER_GROUP or size + len(row.image) > BYTES_PER_GROUP):
            yield group
            group, size = [], 0
        group.append(row)
        size += len(row.image)
    if group:
        yield group


def write_index(target: Location, classes: Sequence[str], shards: Sequence[dict[str, Any]]) -> None:
    """Write the index, which turns a directory of shards into a table.

    Args:
        target: directory of the table.
        classes: class names of the table.
        shards: the values that `write_shard` returned, in the order of the shards.
    Raises:
        DataError: there are no shards.
    """
    if not shards:
        raise DataError(f"{target.where}: found zero images, expected at least one. Check where the images come from.")
    rows_of_class = [sum(counts) for counts in zip(*(shard["rows_of_class"] for shard in shards), strict=True)]
    target.write_json(
        INDEX_NAME,
        {
            "format": FORMAT_VERSION,
            "classes": list(classes),
            "rows": sum(rows_of_class),
            "rows_of_class": rows_of_class,
            "shards": [{key: value for key, value in shard.items() if key != "rows_of_class"} for shard in shards],
        },
    )
