"""Checks that the shards of a table are what its index says."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from multitask.data.classes import not_supported
from multitask.data.format import ID, IMAGE, INDEX_NAME, LABEL, shard_schema
from multitask.data.index import TableIndex, TableShard
from multitask.data.storage import REMAKE, DataError, Location
from patches.quoting import quoted, shortened


def check_shard(
    location: Location, shard: TableShard, classes: tuple[str, ...], verify: bool
) -> NDArray[np.int64] | None:
    """Check one shard against the index.

    Args:
        location: directory of the table.
        shard: what the index says about the shard.
        classes: class names of the table.
        verify: also compare the SHA-256, and check every label.
    Returns:
        The number of rows of each class, shape (classes,). Without `verify` it is unknown and the result is None.
    Raises:
        DataError: the shard is missing, or differs from what the index says.
    """
    file = f"{location.where}/{shard.file}"
    size = location.size(shard.file)
    if size is None:
        raise DataError(f"{file}: found no such file, expected a part of an image table. {REMAKE}")
    if size != shard.bytes:
        raise DataError(f"{file}: found {size} bytes, expected {shard.bytes} from the index. {REMAKE}")
    if verify and (found := location.sha256(shard.file)) != shard.sha256:
        raise DataError(f"{file}: found SHA-256 {found}, expected {shard.sha256} from the index. {REMAKE}")
    with location.open(shard.file) as stream, parquet_errors(file):
        reader = pq.ParquetFile(stream, page_checksum_verification=True)
        check_schema(reader.schema_arrow, classes, file)
        groups = tuple(reader.metadata.row_group(group).num_rows for group in range(reader.num_row_groups))
        if sum(groups) != shard.rows or groups != shard.groups:
            raise DataError(
                f"{file}: found {sum(groups)} rows, expected {shard.rows} from the index (the row groups have "
                f"{quoted(groups)} rows, expected {quoted(shard.groups)}). {REMAKE}"
            )
        if not verify:
            return None
        labels = checked_labels(reader.read(columns=[LABEL]), classes, file)
    return np.bincount(labels, minlength=len(classes))


def check_counts(counts: NDArray[np.int64], index: TableIndex, where: str) -> None:
    """Check the number of rows of each class, counted in all shards, against the index.

    Args:
        counts: shape (classes,).
        index: the index of the table.
        where: name of the table in messages.
    Raises:
        DataError: the numbers differ.
    """
    if counts.tolist() != index.rows_of_class or counts.sum() != index.rows:
        raise DataError(
            f"{where}: found {counts.sum()} rows, {quoted(counts.tolist())} for each class, expected {index.rows} "
            f"rows, {quoted(index.rows_of_class)}, from {INDEX_NAME}. {REMAKE}"
        )


@contextmanager
def parquet_errors(file: str) -> Iterator[None]:
    """Turn Arrow's errors inside the `with` block, also those of texts that are not UTF-8, into a `DataError` that
    names the file."""
    try:
        yield
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(f"{file}: cannot be read as Parquet ({shortened(error)}). {REMAKE}") from error


def check_schema(schema: pa.Schema, classes: tuple[str, ...], file: str) -> None:
    """Check the columns and the metadata of a shard's schema.

    Raises:
        DataError: the column of images or of labels is missing or has another type, or the format version or the
            class list in the metadata is another one.
    """
    for name in (IMAGE, LABEL):
        expected = shard_schema(classes).field(name).type
        found = schema.field(name).type if name in schema.names else "no such column"
        if found != expected:
            reason = not_supported(found) if name == LABEL and isinstance(found, pa.DataType) else None
            raise DataError(f"{file}: found {found} as column '{name}', expected {expected}{_so(reason)}")
    metadata = schema.metadata or {}
    for key, value in shard_schema(classes).metadata.items():
        if metadata.get(key) != value:
            raise DataError(
                f"{file}: found {quoted(metadata.get(key))} as {key.decode()} in its schema, expected "
                f"{quoted(value)}: the shard belongs to another table. {REMAKE}"
            )


def _so(reason: str | None) -> str:
    """Return the end of a message: the reason, or what to do about a damaged shard."""
    return f". {REMAKE}" if reason is None else f"; {reason}"


def checked_labels(table: pa.Table, classes: tuple[str, ...], file: str, first_row: int = 0) -> NDArray[np.int64]:
    """Check that no value is missing except ids, and that every label is in the class list.

    Args:
        table: rows of a shard.
        classes: class names of the table.
        file: name of the shard in messages.
        first_row: row of the shard at which `table` starts.
    Returns:
        The labels, shape (rows,).
    Raises:
        DataError: a value is missing, or a label lies outside the class list.
    """
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
