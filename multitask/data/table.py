"""Reading an image table. It is checked when it is opened; row groups are fetched when they are needed."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from multitask.data.checks import check_counts, check_schema, check_shard, checked_labels, parquet_errors
from multitask.data.classes import positions
from multitask.data.format import ID, IMAGE, LABEL, Row
from multitask.data.index import TableIndex, TableShard, read_index
from multitask.data.storage import DataError, Location, locate

CHECKS_AT_ONCE = 8
"""Number of shards that are checked at the same time. This hides the latency of an object store, and uses the cores of
a large machine."""
Damaged = Literal["fail", "skip"]
"""What happens when a shard is missing or differs from the index: an error, or a warning and a table without it."""
log = logging.getLogger(__name__)


class RowGroup:
    """Consecutive rows of a table, held in memory."""

    def __init__(self, images: pa.ChunkedArray, labels: NDArray[np.int64], ids: Sequence[str | None]) -> None:
        self.labels = labels
        """Shape (rows,), int64."""
        self.ids = ids
        """Name of each image in the data set that it came from, or None."""
        # The result is one chunk: Arrow only splits columns above 2 GB, and a row group is always smaller.
        column = images.combine_chunks()
        _, offsets, values = column.buffers()
        # DLPack passes Arrow's memory on without a copy. torch.frombuffer would warn, because Arrow's buffers are
        # read-only.
        self._values = torch.from_dlpack(pa.Array.from_buffers(pa.uint8(), values.size, [None, values]))
        self._offsets = np.frombuffer(offsets, dtype=np.int32)[column.offset : column.offset + len(column) + 1]

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, row: int) -> Tensor:
        """Return the encoded image of a row, shape (bytes,), uint8. It is Arrow's memory and must not be changed."""
        return self._values[self._offsets[row] : self._offsets[row + 1]]


class ImageTable:
    """An opened table, made by `open_table`. It can be pickled, and it is small however many rows the table has."""

    def __init__(self, location: Location, classes: Sequence[str], shards: Sequence[TableShard]) -> None:
        self.uri = location.where
        """Local path or URI of the table."""
        self.classes = tuple(classes)
        """Class names. Label i means `classes[i]`."""
        self.shards = tuple(shards)
        self.group_rows = np.array([rows for shard in shards for rows in shard.groups], dtype=np.int64)
        """Number of rows of each row group, in order, shape (groups,)."""
        self._location = location
        self._places = [(shard, group) for shard in shards for group in range(len(shard.groups))]
        self._starts = np.concatenate([[0], np.cumsum(self.group_rows)])

    @property
    def num_rows(self) -> int:
        """Number of rows of the table."""
        return int(self._starts[-1])

    @property
    def identity(self) -> str:
        """A hash (hex) of the table's images, their order, their labels and the class list."""
        shards = [(shard.sha256, shard.rows) for shard in self.shards]
        return hashlib.sha256(json.dumps([list(self.classes), shards]).encode()).hexdigest()

    def in_classes(self, classes: Sequence[str]) -> "ImageTable":
        """Return the same rows with labels that are positions in another class list. Classes are matched by name.

        Args:
            classes: the class list. It may have another order than the table's own, and names that the table lacks.
        Raises:
            DataError: the table has a class that is not in the list.
        """
        for names in dict.fromkeys(shard.classes for shard in self.shards):
            positions(names, classes, self.uri)
        return ImageTable(self._location, classes, self.shards)

    def read_group(self, number: int) -> RowGroup:
        """Fetch one row group.

        Raises:
            DataError: the shard is missing, is not a Parquet file of this table, or has a row without image or label.
        """
        shard, group = self._places[number]
        file = f"{self.uri}/{shard.file}"
        with self._location.open(shard.file) as stream, parquet_errors(file):
            reader = pq.ParquetFile(stream, pre_buffer=True, page_checksum_verification=True)
            wanted = [name for name in (IMAGE, LABEL, ID) if name in reader.schema_arrow.names]
            check_schema(reader.schema_arrow, shard.classes, file)
            table = reader.read_row_group(group, columns=wanted, use_threads=False)
        first_row = sum(shard.groups[:group])
        labels = self._labels(table, shard, first_row)
        ids = table[ID].to_pylist() if ID in wanted else [None] * len(labels)
        return RowGroup(table[IMAGE], labels, ids)

    def groups(self) -> Iterator[RowGroup]:
        """Fetch all row groups in order. One of them is in memory at a time."""
        return map(self.read_group, range(len(self.group_rows)))

    def labels(self) -> NDArray[np.int64]:
        """Read the labels of all rows, shape (num_rows,), without reading any image."""
        labels = []
        for shard in self.shards:
            file = f"{self.uri}/{shard.file}"
            with self._location.open(shard.file) as stream, parquet_errors(file):
                rows = pq.read_table(stream, columns=[LABEL], page_checksum_verification=True)
                labels.append(self._labels(rows, shard))
        return np.concatenate(labels)

    def rows_of_class(self) -> NDArray[np.int64]:
        """Count the rows of each class, shape (classes,), without reading any image."""
        return np.bincount(self.labels(), minlength=len(self.classes))

    def first_row(self, group: int) -> int:
        """Return the row of the table at which a row group starts."""
        return int(self._starts[group])

    def row(self, index: int) -> Row:
        """Read one row. This fetches the whole row group that contains it.

        Raises:
            IndexError: the table has no such row.
        """
        return self.rows([index])[0]

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """Read rows, in the given order. Each row group that contains some of them is fetched once.

        Raises:
            IndexError: the table has no such row.
        """
        found = {}
        for group, members in groupby(sorted(indices), key=self._group_of):
            fetched, first = self.read_group(group), self.first_row(group)
            for index in members:
                place = index - first
                image = fetched.encoded(place).numpy().tobytes()
                found[index] = Row(image, int(fetched.labels[place]), fetched.ids[place])
        return [found[index] for index in indices]

    def source(self, index: int) -> str:
        """Return where a row is stored, for messages: the file of its shard, and the row's number in that file."""
        group = self._group_of(index)
        shard, number = self._places[group]
        return f"{self.uri}/{shard.file}, row {index - self.first_row(group) + sum(shard.groups[:number])}"

    def _labels(self, rows: pa.Table, shard: TableShard, first_row: int = 0) -> NDArray[np.int64]:
        """Return the checked labels of rows of a shard as positions in the class list, shape (rows,)."""
        file = f"{self.uri}/{shard.file}"
        labels = checked_labels(rows, shard.classes, file, first_row)
        return labels if shard.classes == self.classes else positions(shard.classes, self.classes, file)[labels]

    def _group_of(self, index: int) -> int:
        """Return the number of the row group that contains a row."""
        if not 0 <= index < self.num_rows:
            raise IndexError(f"Row {index} does not exist: {self.uri} has rows 0 to {self.num_rows - 1}.")
        return int(np.searchsorted(self._starts, index, side="right")) - 1


def open_table(uri: str | os.PathLike[str], *, verify: bool = True, damaged: Damaged = "fail") -> ImageTable:
    """Open a table and check its shards against its index.

    Args:
        uri: local path, or the URI of any pyarrow filesystem (file://, s3://, gs://, ...).
        verify: read every shard once to compare its SHA-256 and its labels with the index. Without it, a changed page
            is noticed when it is read, by its checksum; shards of version 0.1 have none.
        damaged: what happens when a shard is missing or differs from the index. "fail" raises an error; "skip" leaves
            the shard out and logs a warning.
    Raises:
        DataError: the index or a shard is missing, was changed, or has another format, or a label is out of range.
    """
    location = locate(uri)
    index = read_index(location)
    intact, counts = _intact_shards(location, index, verify, damaged)
    if not sum(shard.rows for shard in intact):
        raise DataError(
            f"{location.where}: found zero images, expected at least one. Write the table from data that has some."
        )
    if verify and len(intact) == len(index.shards):
        check_counts(counts, index, location.where)
    return ImageTable(location, index.classes, intact)


def _intact_shards(
    location: Location, index: TableIndex, verify: bool, damaged: Damaged
) -> tuple[list[TableShard], NDArray[np.int64]]:
    """Check all shards of a table, several at the same time.

    Returns:
        The shards that agree with the index, and the number of rows of each class that was counted in them.
    """
    intact: list[TableShard] = []
    counts = np.zeros(len(index.classes), dtype=np.int64)
    with ThreadPoolExecutor(CHECKS_AT_ONCE) as threads:
        checks = [threads.submit(check_shard, location, shard, index.classes, verify) for shard in index.shards]
        for shard, check in zip(index.shards, checks, strict=True):
            try:
                found = check.result()
            except DataError as error:
                if damaged == "fail":
                    threads.shutdown(cancel_futures=True)
                    raise
                log.warning("Left out %d rows: %s", shard.rows, error)
                continue
            intact.append(shard)
            if found is not None:
                counts += found
    return intact, counts


def open_tables(folder: str, names: Sequence[str], *, verify: bool = True, damaged: Damaged = "fail") -> ImageTable:
    """Open several tables of one folder as a single table that has their rows one after the other. Nothing is copied.

    Args:
        folder: local path or URI of the folder that contains the tables.
        names: names of the tables in the folder.
        verify, damaged: as in `open_table`.
    Returns:
        One table with the class list of the first. The classes of the others are matched by name.
    Raises:
        DataError: a table cannot be opened, or has a class that the first one lacks.
    """
    tables = {name: open_table(f"{folder}/{name}", verify=verify, damaged=damaged) for name in names}
    classes = tables[names[0]].classes
    shards = [
        replace(shard, file=f"{name}/{shard.file}")
        for name, table in tables.items()
        for shard in table.in_classes(classes).shards
    ]
    return ImageTable(locate(folder), classes, shards)
