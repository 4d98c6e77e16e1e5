"""Reading an image table: checked when it is opened, row groups fetched when they are asked for."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from multitask.data.format import (
    FORMAT_VERSION,
    ID,
    IMAGE,
    INDEX_NAME,
    LABEL,
    Row,
    check_classes,
    shard_schema,
)
from multitask.data.storage import DataError, Location, locate

REMAKE = "Copy the table again from where it came from, or write it anew."
CHECKS_AT_ONCE = 8
"""Shards that are hashed at the same time: hides the waits of an object store, and uses a large machine's cores."""
Damaged = Literal["fail", "skip"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """What the index says of one file."""

    file: str
    rows: int
    bytes: int
    sha256: str
    groups: tuple[int, ...]
    """Rows of each row group."""


class RowGroup:
    """Consecutive rows of a table, in memory."""

    def __init__(self, images: pa.ChunkedArray, labels: NDArray[np.int64], ids: Sequence[str | None]) -> None:
        self.labels = labels
        """Shape (rows,), int64."""
        self.ids = ids
        # One chunk: Arrow splits columns beyond 2 GB only, which a row group never reaches.
        column = images.combine_chunks()
        _, offsets, values = column.buffers()
        # DLPack hands over Arrow's memory as it is; torch.frombuffer would warn, as Arrow's buffers are read-only.
        self._values = torch.from_dlpack(pa.Array.from_buffers(pa.uint8(), values.size, [None, values]))
        self._offsets = np.frombuffer(offsets, dtype=np.int32)[column.offset : column.offset + len(column) + 1]

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, row: int) -> Tensor:
        """Encoded image without a copy: shape (bytes,), uint8; for reading only, as it is Arrow's memory."""
        return self._values[self._offsets[row] : self._offsets[row + 1]]


class ImageTable:
    """An opened table; picklable, and small whatever the table's size. `open_table` makes one."""

    def __init__(self, location: Location, classes: Sequence[str], shards: Sequence[Shard]) -> None:
        self.uri = location.where
        self.classes = tuple(classes)
        self.shards = tuple(shards)
        self.group_rows = np.array([rows for shard in shards for rows in shard.groups], dtype=np.int64)
        """Shape (groups,): rows of each row group, in order."""
        self._location = location
        self._places = [(shard, group) for shard in shards for group in range(len(shard.groups))]
        self._starts = np.concatenate([[0], np.cumsum(self.group_rows)])

    @property
    def num_rows(self) -> int:
        return int(self._starts[-1])

    def read_group(self, number: int) -> RowGroup:
        """Fetch one row group.

        Raises:
            DataError: the shard is missing or no Parquet of this table, or a row of it is not whole.
        """
        shard, group = self._places[number]
        file = f"{self.uri}/{shard.file}"
        with self._location.open(shard.file) as stream, _parquet(file):
            reader = pq.ParquetFile(stream, pre_buffer=True)
            wanted = [name for name in (IMAGE, LABEL, ID) if name in reader.schema_arrow.names]
            _check_schema(reader.schema_arrow, self.classes, file)
            table = reader.read_row_group(group, columns=wanted, use_threads=False)
        first_row = sum(shard.groups[:group])
        labels = _checked_labels(table, self.classes, file, first_row)
        ids = table[ID].to_pylist() if ID in wanted else [None] * len(labels)
        return RowGroup(table[IMAGE], labels, ids)

    def groups(self) -> Iterator[RowGroup]:
        """All row groups in order, one in memory at a time."""
        return map(self.read_group, range(len(self.group_rows)))

    def labels(self) -> NDArray[np.int64]:
        """Labels of all rows, shape (num_rows,); no image is read."""
        labels = []
        for shard in self.shards:
            file = f"{self.uri}/{shard.file}"
            with self._location.open(shard.file) as stream, _parquet(file):
                labels.append(_checked_labels(pq.read_table(stream, columns=[LABEL]), self.classes, file))
        return np.concatenate(labels)

    def first_row(self, group: int) -> int:
        """Table row at which a row group starts."""
        return int(self._starts[group])

    def row(self, index: int) -> Row:
        """One row; its whole row group is fetched for it.

        Raises:
            IndexError: the table has no such row.
        """
        group = self._group_of(index)
        fetched, place = self.read_group(group), index - self.first_row(group)
        return Row(fetched.encoded(place).numpy().tobytes(), int(fetched.labels[place]), fetched.ids[place])

    def source(self, index: int) -> str:
        """Where a row lies, for messages: shard file and row in it."""
        group = self._group_of(index)
        shard, number = self._places[group]
        return f"{self.uri}/{shard.file}, row {index - self.first_row(group) + sum(shard.groups[:number])}"

    def _group_of(self, index: int) -> int:
        if not 0 <= index < self.num_rows:
            raise IndexError(f"Row {index} of {self.uri}, which has rows 0 to {self.num_rows - 1}.")
        return int(np.searchsorted(self._starts, index, side="right")) - 1


def open_table(uri: str | os.PathLike[str], *, verify: bool = True, damaged: Damaged = "fail") -> ImageTable:
    """Open a table and check its shards against its index.

    Args:
        uri: local path or the URI of any pyarrow filesystem (file://, s3://, gs://, ...).
        verify: read every shard once to compare its SHA-256 and its labels with the index; without it, an edit that
            keeps a shard's length, schema and row count goes unnoticed.
        damaged: what a shard that is missing or differs does: fail, or be left out with a warning.
    Raises:
        DataError: the index or a shard is missing, edited or of another format, or a label is out of range.
    """
    location = locate(uri)
    index = _read_index(location)
    classes = check_classes(index["classes"], f"{location.where}/{INDEX_NAME}")
    shards = [Shard(**(entry | {"groups": tuple(entry["groups"])})) for entry in index["shards"]]
    with ThreadPoolExecutor(CHECKS_AT_ONCE) as threads:
        checks = [threads.submit(_check_shard, location, shard, classes, verify) for shard in shards]
        counts: list[NDArray[np.int64]] = []
        whole: list[Shard] = []
        for shard, check in zip(shards, checks, strict=True):
            try:
                counts += check.result()
                whole.append(shard)
            except DataError as error:
                if damaged == "fail":
                    threads.shutdown(cancel_futures=True)
                    raise
                log.warning("Left out %d rows: %s", shard.rows, error)
    if not sum(shard.rows for shard in whole):
        raise DataError(
            f"{location.where}: found zero images, expected at least one. Write the table from data that has some."
        )
    if verify and len(whole) == len(shards):
        _check_counts(np.sum(counts, axis=0), index, location.where)
    return ImageTable(location, classes, whole)


def open_tables(folder: str, names: Sequence[str], *, verify: bool = True, damaged: Damaged = "fail") -> ImageTable:
    """Open tables of one folder as a single one: their rows one after the other, nothing is copied.

    Args:
        folder: as `uri` of `open_table`, which opens each of them.
        names: of the tables in it.
    Raises:
        DataError: as `open_table`, or their class lists differ.
    """
    tables = {name: open_table(f"{folder}/{name}", verify=verify, damaged=damaged) for name in names}
    classes = tables[names[0]].classes
    for table in tables.values():
        if table.classes != classes:
            raise DataError(
                f"{table.uri}: found {len(table.classes)} classes that differ from the {len(classes)} of table "
                f"'{names[0]}' beside it, expected the same list. Import both with one class list."
            )
    shards = [replace(shard, file=f"{name}/{shard.file}") for name in names for shard in tables[name].shards]
    return ImageTable(locate(folder), classes, shards)


def _check_shard(location: Location, shard: Shard, classes: tuple[str, ...], verify: bool) -> list[NDArray[np.int64]]:
    """Rows of each class, shape (classes,), of a shard that is as the index says; nothing without `verify`."""
    file = f"{location.where}/{shard.file}"
    size = location.size(shard.file)
    if size is None:
        raise DataError(f"{file}: found no such file, expected a part of an image table. {REMAKE}")
    if size != shard.bytes:
        raise DataError(f"{file}: found {size} bytes, expected {shard.bytes} from the index. {REMAKE}")
    if verify and (found := location.sha256(shard.file)) != shard.sha256:
        raise DataError(f"{file}: found SHA-256 {found}, expected {shard.sha256} from the index. {REMAKE}")
    with location.open(shard.file) as stream, _parquet(file):
        reader = pq.ParquetFile(stream)
        _check_schema(reader.schema_arrow, classes, file)
        groups = tuple(reader.metadata.row_group(group).num_rows for group in range(reader.num_row_groups))
        if sum(groups) != shard.rows or groups != shard.groups:
            raise DataError(
                f"{file}: found {sum(groups)} rows, expected {shard.rows} from the index "
                f"(row groups of {groups} and {shard.groups} rows). {REMAKE}"
            )
        if not verify:
            return []
        labels = _checked_labels(reader.read(columns=[LABEL]), classes, file)
    return [np.bincount(labels, minlength=len(classes))]


def _check_counts(counts: NDArray[np.int64], index: dict[str, Any], where: str) -> None:
    if counts.tolist() != index["rows_of_class"] or counts.sum() != index["rows"]:
        raise DataError(
            f"{where}: found {counts.sum()} rows, {counts.tolist()} for each class, expected {index['rows']} rows, "
            f"{index['rows_of_class']}, from {INDEX_NAME}. {REMAKE}"
        )


@contextmanager
def _parquet(file: str) -> Iterator[None]:
    """Block in which Arrow's errors become messages about the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as Parquet ({error}). {REMAKE}") from error


def _read_index(location: Location) -> dict[str, Any]:
    name = f"{location.where}/{INDEX_NAME}"
    if location.size(INDEX_NAME) is None:
        raise DataError(
            f"{location.where}: found no {INDEX_NAME}, expected an image table. Check the table's location; an import "
            "that was broken off goes on when it is started again."
        )
    try:
        index = json.loads(location.read(INDEX_NAME))
        version = index["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name}: found no table index ({error!r}), expected JSON with 'format'. {REMAKE}") from error
    if version != FORMAT_VERSION:
        raise DataError(
            f"{name}: found format {version!r}, expected {FORMAT_VERSION}. Read it with the version of this program "
            "that wrote it, or write the table anew."
        )
    problem = _index_problem(index)
    if problem:
        raise DataError(f"{name}: {problem}. {REMAKE}")
    return index


def _index_problem(index: dict[str, Any]) -> str | None:
    fields = {"classes": list, "rows": int, "rows_of_class": list, "shards": list}
    shard_fields = {"file": str, "rows": int, "bytes": int, "sha256": str, "groups": list}
    entries = [("the index", index, fields)]
    if isinstance(index.get("shards"), list):
        entries += [(f"shard {i}", shard, shard_fields) for i, shard in enumerate(index["shards"])]
    for name, entry, expected in entries:
        for key, kind in expected.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                found = repr(entry.get(key)) if isinstance(entry, dict) else repr(entry)
                return f"found {found} for '{key}' of {name}, expected {kind.__name__}"
    return None


def _check_schema(schema: pa.Schema, classes: tuple[str, ...], file: str) -> None:
    for name in (IMAGE, LABEL):
        expected = shard_schema(classes).field(name).type
        found = schema.field(name).type if name in schema.names else "no such column"
        if found != expected:
            raise DataError(f"{file}: found {found} as column '{name}', expected {expected}. {REMAKE}")
    metadata = schema.metadata or {}
    for key, value in shard_schema(classes).metadata.items():
        if metadata.get(key) != value:
            raise DataError(
                f"{file}: found {metadata.get(key)!r} as {key.decode()} in its schema, expected {value!r}: "
                f"the shard belongs to another table. {REMAKE}"
            )


def _checked_labels(table: pa.Table, classes: tuple[str, ...], file: str, first_row: int = 0) -> NDArray[np.int64]:
    for name in table.column_names:
        if name != ID and table[name].null_count:
            row = first_row + int(np.argmax(table[name].is_null().to_numpy()))
            raise DataError(f"{file}, row {row}: found no {name}, expected one in each row. {REMAKE}")
    labels: NDArray[np.int64] = table[LABEL].to_numpy()
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        raise DataError(
            f"{file}, row {first_row + int(wrong[0])}: found label {labels[wrong[0]]}, but {len(classes)} classes "
            f"allow 0 to {len(classes) - 1} ({len(wrong)} such rows). Correct the labels or the class list and write "
            "the table anew."
        )
    return labels
