"""Reading an image table: everything is checked when it is opened, and the encoded images stay in Arrow memory."""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from multitask.data.format import (
    CLASSES_KEY,
    FORMAT_VERSION,
    IMAGE,
    INDEX_NAME,
    LABEL,
    VERSION_KEY,
    DataError,
    check_classes,
    shard_schema,
)

REMAKE = "Copy the table again from where it came from, or write it anew."


@dataclass(frozen=True)
class _Piece:
    """One Arrow chunk of encoded images."""

    file: str
    first_row: int
    """Row of its shard at which the chunk starts."""
    values: Tensor
    """Shape (bytes,), uint8: all images of the chunk, aliasing Arrow's buffer."""
    offsets: NDArray[np.int32]
    """Shape (rows + 1,): image i is values[offsets[i] : offsets[i + 1]]."""


class ImageTable:
    """The rows of an opened table, in their order on disk. `open_table` makes one."""

    def __init__(self, uri: str, classes: Sequence[str], labels: NDArray[np.int64], pieces: Sequence[_Piece]) -> None:
        self.uri = uri
        self.classes = tuple(classes)
        self.labels = labels
        """Shape (num_rows,), int64, read-only."""
        self._pieces = pieces
        self._starts = list(accumulate((len(piece.offsets) - 1 for piece in pieces), initial=0))

    @property
    def num_rows(self) -> int:
        return len(self.labels)

    def encoded_tensor(self, index: int) -> Tensor:
        """Encoded image of a row without a copy: shape (bytes,), uint8; for reading only, as it is Arrow's memory."""
        piece, row = self._locate(index)
        return piece.values[piece.offsets[row] : piece.offsets[row + 1]]

    def encoded(self, index: int) -> bytes:
        """Encoded image of a row."""
        return self.encoded_tensor(index).numpy().tobytes()

    def source(self, index: int) -> str:
        """Where a row came from, for messages: shard file and row in it."""
        piece, row = self._locate(index)
        return f"{piece.file}, row {piece.first_row + row}"

    def _locate(self, index: int) -> tuple[_Piece, int]:
        if not 0 <= index < self.num_rows:
            raise IndexError(f"Row {index} of {self.uri}, which has rows 0 to {self.num_rows - 1}.")
        piece = bisect_right(self._starts, index) - 1
        return self._pieces[piece], index - self._starts[piece]


def open_table(uri: str | os.PathLike[str], *, verify: bool = True) -> ImageTable:
    """Read a table and check it against its index.

    Args:
        uri: local path or the URI of any pyarrow filesystem (file://, s3://, gs://, ...).
        verify: compare each shard's SHA-256 with the index; without it, an edit that keeps a shard's length and
            row count goes unnoticed.
    Raises:
        DataError: the index or a shard is missing, edited or of another format, or a label is out of range.
    """
    filesystem, root = _resolve(uri)
    where = root if isinstance(filesystem, pa.fs.LocalFileSystem) else os.fspath(uri).rstrip("/")
    index = _read_index(filesystem, root, where)
    classes = check_classes(index["classes"], f"{where}/{INDEX_NAME}")
    labels, pieces = [], []
    for shard in index["shards"]:
        file = f"{where}/{shard['file']}"
        content = _read(filesystem, f"{root}/{shard['file']}", file)
        _check_content(content, shard, file, verify)
        table = _parse_shard(content, classes, file)
        if table.num_rows != shard["rows"]:
            raise DataError(f"{file}: found {table.num_rows} rows, expected {shard['rows']} from the index. {REMAKE}")
        labels.append(_checked_labels(table, classes, file))
        pieces += _pieces(table, file)
    if index["rows"] == 0:
        raise DataError(f"{where}: found zero images, expected at least one. Write the table from data that has some.")
    all_labels = np.concatenate([np.empty(0, np.int64), *labels])
    counts = np.bincount(all_labels, minlength=len(classes)).tolist()
    if counts != index["rows_of_class"] or len(all_labels) != index["rows"]:
        raise DataError(
            f"{where}: found {len(all_labels)} rows, {counts} for each class, expected {index['rows']} rows, "
            f"{index['rows_of_class']}, from {INDEX_NAME}. {REMAKE}"
        )
    all_labels.flags.writeable = False
    return ImageTable(where, classes, all_labels, pieces)


def _resolve(uri: str | os.PathLike[str]) -> tuple[pa.fs.FileSystem, str]:
    text = os.fspath(uri)
    if "://" not in text:
        filesystem, root = pa.fs.LocalFileSystem(), os.path.abspath(text)
    else:
        try:
            filesystem, root = pa.fs.FileSystem.from_uri(text)
        except (pa.ArrowException, ValueError) as error:
            raise DataError(
                f"{text}: found a location that cannot be read ({error}), expected a local path or a URI such as "
                "file:///data/train or s3://bucket/train. Correct the table's location."
            ) from error
    if isinstance(filesystem, pa.fs.LocalFileSystem):
        filesystem = pa.fs.LocalFileSystem(use_mmap=True)
    return filesystem, root.rstrip("/")


def _read(filesystem: pa.fs.FileSystem, path: str, where: str) -> pa.Buffer:
    """Content of a file: mapped when it is local, in memory otherwise."""
    try:
        with filesystem.open_input_file(path) as file:
            return file.read_buffer()
    except FileNotFoundError as error:
        raise DataError(f"{where}: found no such file, expected a part of an image table. {REMAKE}") from error
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error}). Check the location and the rights to read it.") from error


def _read_index(filesystem: pa.fs.FileSystem, root: str, where: str) -> dict[str, Any]:
    name = f"{where}/{INDEX_NAME}"
    if filesystem.get_file_info(f"{root}/{INDEX_NAME}").type == pa.fs.FileType.NotFound:
        raise DataError(
            f"{where}: found no {INDEX_NAME}, expected a directory made by write_table. Check the table's location."
        )
    try:
        index = json.loads(_read(filesystem, f"{root}/{INDEX_NAME}", name).to_pybytes())
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
    shard_fields = {"file": str, "rows": int, "bytes": int, "sha256": str}
    entries = [("the index", index, fields)]
    if isinstance(index.get("shards"), list):
        entries += [(f"shard {i}", shard, shard_fields) for i, shard in enumerate(index["shards"])]
    for name, entry, expected in entries:
        for key, kind in expected.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                found = repr(entry.get(key)) if isinstance(entry, dict) else repr(entry)
                return f"found {found} for '{key}' of {name}, expected {kind.__name__}"
    return None


def _check_content(content: pa.Buffer, shard: dict[str, Any], file: str, verify: bool) -> None:
    if content.size != shard["bytes"]:
        raise DataError(f"{file}: found {content.size} bytes, expected {shard['bytes']} from the index. {REMAKE}")
    if verify:
        found = hashlib.sha256(content).hexdigest()
        if found != shard["sha256"]:
            raise DataError(f"{file}: found SHA-256 {found}, expected {shard['sha256']} from the index. {REMAKE}")


def _parse_shard(content: pa.Buffer, classes: tuple[str, ...], file: str) -> pa.Table:
    try:
        reader = pq.ParquetFile(pa.BufferReader(content))
        schema = reader.schema_arrow
        for field in shard_schema(classes):
            found = schema.field(field.name).type if field.name in schema.names else "no such column"
            if found != field.type:
                raise DataError(f"{file}: found {found} as column '{field.name}', expected {field.type}. {REMAKE}")
        metadata = schema.metadata or {}
        expected = shard_schema(classes).metadata
        for key in (VERSION_KEY, CLASSES_KEY):
            if metadata.get(key) != expected[key]:
                raise DataError(
                    f"{file}: found {metadata.get(key)!r} as {key.decode()} in its schema, expected {expected[key]!r}: "
                    f"the shard belongs to another table. {REMAKE}"
                )
        return reader.read(columns=[IMAGE, LABEL])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as Parquet ({error}). {REMAKE}") from error


def _checked_labels(table: pa.Table, classes: tuple[str, ...], file: str) -> NDArray[np.int64]:
    for name in (IMAGE, LABEL):
        if table[name].null_count:
            row = int(np.argmax(table[name].is_null().to_numpy()))
            raise DataError(f"{file}, row {row}: found no {name}, expected one in each row. {REMAKE}")
    labels = table[LABEL].to_numpy()
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{file}, row {row}: found label {labels[row]}, but {len(classes)} classes allow 0 to {len(classes) - 1} "
            f"({len(wrong)} such rows in this file). Correct the labels or the class list and write the table anew."
        )
    return labels


def _pieces(table: pa.Table, file: str) -> list[_Piece]:
    pieces, row = [], 0
    for chunk in table[IMAGE].chunks:
        if len(chunk) == 0:
            continue
        _, offsets, values = chunk.buffers()
        # DLPack hands over Arrow's memory as it is; torch.frombuffer would warn, as Arrow's buffers are read-only.
        shared = pa.Array.from_buffers(pa.uint8(), values.size, [None, values])
        bounds = np.frombuffer(offsets, dtype=np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        pieces.append(_Piece(file, row, torch.from_dlpack(shared), bounds))
        row += len(chunk)
    return pieces
