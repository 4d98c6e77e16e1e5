"""Image tables on disk: a directory of Parquet shards and the index that describes them.

Each shard has the columns `image` (binary, an encoded image as its file has it), `label` (int64, a position in the
class list), `id` (string or null: the image's name in the data set it came from) and `source` (string or null: that
data set's name). Readers need the first two and ignore further ones. Shards carry the format version and the class
list in their schema metadata. `index.json` is written last and makes a directory a table: it lists classes, counts,
and rows, bytes, SHA-256 and row groups of each shard.
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

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
IMAGE, LABEL, ID, SOURCE = "image", "label", "id", "source"
VERSION_KEY, CLASSES_KEY = b"multitask.format", b"multitask.classes"
ROWS_PER_SHARD = 4096
ROWS_PER_GROUP, BYTES_PER_GROUP = 1024, 1 << 23
"""A row group, which readers fetch as a whole, ends at the first of the two: many small images compress well
together, and large ones stay in small pieces."""


class Row(NamedTuple):
    """One image of a table."""

    image: bytes
    """Encoded, as its file has it."""
    label: int
    id: str | None = None


def shard_schema(classes: Sequence[str]) -> pa.Schema:
    """Arrow schema of every shard of a table with these classes."""
    metadata = {VERSION_KEY: str(FORMAT_VERSION), CLASSES_KEY: json.dumps(list(classes))}
    fields = [(IMAGE, pa.binary()), (LABEL, pa.int64()), (ID, pa.string()), (SOURCE, pa.string())]
    return pa.schema([pa.field(*field) for field in fields], metadata=metadata)


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
    images: Iterable[tuple[bytes, int] | Row],
    classes: Sequence[str],
    *,
    rows_per_shard: int = ROWS_PER_SHARD,
    compression_level: int = 3,
) -> None:
    """Write a new table: all of it appears under `directory`, or nothing does.

    Equal input gives equal bytes. At most one row group is held in memory.

    Args:
        directory: local path or URI that must not exist yet.
        images: encoded image, label and, where there is one, id of each row, in the order in which they are kept.
        classes: class names; label i means classes[i].
        rows_per_shard: rows of every shard but the last.
        compression_level: zstd level, 1 to 22.
    Raises:
        DataError: `directory` exists, there are no images, or a label or the class list does not fit.
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
    """Raises:
    DataError: there is something at `target`; a table is only written to a new directory.
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
    """Write one shard and return what the index says of it, with its rows of each class as `rows_of_class`.

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
        ) as writer:
            for group in _groups(rows):
                for row in group:
                    if not 0 <= (label := operator.index(row.label)) < len(classes):
                        raise DataError(
                            f"{target.where}: row {sum(rows_of_class)} of shard {number} has label {label}, but "
                            f"{len(classes)} classes allow 0 to {len(classes) - 1}. Correct the label or give the full "
                            "class list."
                        )
                    rows_of_class[label] += 1
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


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
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
    """Make a directory of shards a table.

    Args:
        shards: what `write_shard` returned, in order.
    Raises:
        DataError: there are no rows.
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
