"""Parquet files as Hugging Face's `datasets` writes them: encoded images in the rows, class names in the metadata."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
from numpy.typing import NDArray

from multitask.data.format import DataError
from multitask.data.sources.files import OUTSIDE, read_file
from multitask.data.sources.labels import read_labels
from multitask.data.sources.parquet import find_parquet, open_parquet

SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}.*\.parquet")
"""How the Hub names shards: the split first."""


@dataclass(frozen=True, eq=False)
class HuggingFaceSource:
    """Images inside Parquet rows; ids are FILE/ROW."""

    name: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    ids: pa.Array
    filesystem: pafs.FileSystem
    folder: str
    files: tuple[str, ...]
    image_column: str
    first_row: NDArray[np.int64]
    """Shape (row groups,): row of this source that each row group starts with."""
    group: NDArray[np.int64]
    """Shape (row groups, 2): position in `files`, number of the row group in that file."""

    def read(self, rows: Sequence[int]) -> Iterator[bytes]:
        groups = (np.searchsorted(self.first_row, np.asarray(rows, np.int64), side="right") - 1).tolist()
        positions_in: dict[int, list[int]] = defaultdict(list)
        for position, group in enumerate(groups):
            positions_in[group].append(position)
        held: dict[int, bytes] = {}
        for position, group in enumerate(groups):
            if position not in held:
                images = self._row_group(group)
                held |= {wanted: self._image(images, group, int(rows[wanted])) for wanted in positions_in[group]}
            yield held.pop(position)

    def _row_group(self, group: int) -> pa.ChunkedArray:
        file, number = self.group[group]
        try:
            with open_parquet(self.filesystem, self.files[file], [self.image_column]) as parquet:
                return parquet.read_row_group(int(number), columns=[self.image_column])[self.image_column]
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.files[file]}: cannot read row group {number} ({error}). Copy it again.") from error

    def _image(self, images: pa.ChunkedArray, group: int, row: int) -> bytes:
        image = images[row - int(self.first_row[group])].as_py() or {}
        if image.get("bytes"):
            return image["bytes"]
        path, identity, file = image.get("path"), self.ids[row].as_py(), self.files[self.group[group, 0]]
        if not path or re.search(OUTSIDE, path):
            raise DataError(
                f"Image '{identity}' (file/row): no bytes in {file}, and the path {path!r} is not one "
                "below its folder. Write the data set with the images' bytes."
            )
        return read_file(self.filesystem, f"{os.path.dirname(file)}/{path}", identity)


def huggingface(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    image_column: str = "image",
    label_column: str = "label",
    classes: Sequence[str] | None = None,
) -> HuggingFaceSource:
    """A source from Parquet files of the Hugging Face Hub, in the order of the files' names and of their rows.

    Args:
        files: one or several of: a Parquet file, a folder of one split's files, a local pattern
            ('data/train-*.parquet'); local or a URI that pyarrow knows. Does not ask the Hub.
        image_column: struct of `bytes` (binary) and `path` (string, used where bytes are missing: below the
            Parquet's folder).
        label_column: class numbers, or class names.
        classes: class names. Without them, the ClassLabel's names in the files' metadata; without these too: sorted
            names where labels are names, else numbers as text.
    Raises:
        DataError: no files, files of several splits or with different class names, or columns of another type.
    """
    filesystem, folder, paths = find_parquet(files)
    splits = {match[1] for path in paths if (match := SHARD.fullmatch(os.path.basename(path)))}
    if len(splits) > 1:
        raise DataError(
            f"{folder} has the splits {sorted(splits)}, expected one. Give a pattern such as "
            f"'{folder}/{min(splits)}-*.parquet'."
        )
    labels, ids, named, first_row, group = [], [], {}, [], []
    rows = 0
    for number, path in enumerate(paths):
        with open_parquet(filesystem, path, [image_column, label_column]) as file:
            _check_image_type(file.schema_arrow.field(image_column).type, image_column, path)
            named[_class_names(file.schema_arrow, label_column)] = path
            labels += file.read([label_column])[label_column].chunks
            shown = os.path.relpath(path, folder).replace(os.sep, "/")
            counted = pa.array(np.arange(file.metadata.num_rows)).cast(pa.string())
            ids.append(pc.binary_join_element_wise(shown, counted, "/"))
            for each in range(file.metadata.num_row_groups):
                first_row.append(rows)
                group.append((number, each))
                rows += file.metadata.row_group(each).num_rows
    if classes is None and len(named) > 1:
        raise DataError(
            f"{', '.join(named.values())} have different class names for column '{label_column}'. Give `classes`, if "
            "the labels mean the same, or import them one by one."
        )
    where = f"{folder}: column '{label_column}'"
    try:
        column = pa.chunked_array(labels)
    except pa.ArrowException as error:
        raise DataError(f"{where}: labels are not of one type in all files ({error}). Import them apart.") from error
    numbers, names = read_labels(column, classes if classes is not None else next(iter(named)), where)
    return HuggingFaceSource(
        name=os.path.basename(folder),
        classes=names,
        labels=numbers,
        ids=pa.concat_arrays(ids),
        filesystem=filesystem,
        folder=folder,
        files=paths,
        image_column=image_column,
        first_row=np.array(first_row, np.int64),
        group=np.array(group, np.int64).reshape(-1, 2),
    )


def _check_image_type(found: pa.DataType, column: str, path: str) -> None:
    names = {field.name: field.type for field in found} if pa.types.is_struct(found) else {}
    if not any(check(names.get("bytes", pa.null())) for check in (pa.types.is_binary, pa.types.is_large_binary)):
        raise DataError(
            f"{path}: column '{column}' is of type {found}, expected a struct with `bytes` (binary) and `path`. Name "
            "the column of the images."
        )


def _class_names(schema: pa.Schema, label_column: str) -> tuple[str, ...] | None:
    """What the metadata says a label means, or None."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label_column]
        return tuple(feature["names"]) if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None
