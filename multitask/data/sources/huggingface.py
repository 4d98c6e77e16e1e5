"""Parquet files that Hugging Face's `datasets` wrote: the rows contain encoded images, the metadata class names."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
from numpy.typing import NDArray

from multitask.data.sources.files import OUTSIDE, read_file
from multitask.data.sources.labels import read_labels
from multitask.data.sources.parquet import find_parquet, open_parquet
from multitask.data.storage import DataError


@dataclass(frozen=True, eq=False)
class HuggingFaceSource:
    """Images inside Parquet rows. The id of an image is FILE/ROW."""

    name: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    ids: pa.Array
    filesystem: pafs.FileSystem
    folder: str
    files: tuple[str, ...]
    image_column: str
    first_row: NDArray[np.int64]
    """First row of each row group in this source, shape (row groups,)."""
    group: NDArray[np.int64]
    """Position in `files`, and number in that file, of each row group, shape (row groups, 2)."""
    notes: tuple[str, ...] = ()

    def read(self, rows: Sequence[int]) -> Iterator[bytes]:
        # When a row group is read, all of its images that `rows` asks for are kept until their turn comes. So each row
        # group is read once, in whatever order the rows are.
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
        """Read the images of one row group."""
        file, number = self.group[group]
        try:
            with open_parquet(self.filesystem, self.files[file], [self.image_column]) as parquet:
                return parquet.read_row_group(int(number), columns=[self.image_column])[self.image_column]
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.files[file]}: cannot read row group {number} ({error}). Copy it again.") from error

    def _image(self, images: pa.ChunkedArray, group: int, row: int) -> bytes:
        """Return the bytes of one image, from its row or from the file that the row names."""
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
    """Return a source of Parquet files from the Hugging Face Hub, in the order of the file names and of their rows.

    Nothing is downloaded.

    Args:
        files: one or several places: a Parquet file, a folder with the files of one split, or a local pattern
            ('data/train-*.parquet'). A place is a local path or a URI that pyarrow knows.
        image_column: name of a column of structs with `bytes` (binary) and `path` (string). If the bytes of an image
            are missing, it is read from `path`, below the folder of its Parquet file.
        label_column: name of the column of class numbers or class names.
        classes: class names. None gives the names of the ClassLabel in the metadata of the files. Without such
            metadata, it gives the sorted names if labels are names, or else the numbers from 0 to the largest label.
    Raises:
        DataError: there are no files, the files belong to several splits or have different class names, or a column is
            missing or has another type.
    """
    filesystem, folder, paths = find_parquet(files)
    parts = [_read_part(filesystem, folder, path, image_column, label_column) for path in paths]
    named = {part.classes: path for part, path in zip(parts, paths, strict=True)}
    if classes is None and len(named) > 1:
        raise DataError(
            f"{', '.join(named.values())} have different class names for column '{label_column}'. Give `classes`, if "
            "the labels mean the same, or import them one by one."
        )
    where = f"{folder}: column '{label_column}'"
    try:
        column = pa.chunked_array([chunk for part in parts for chunk in part.labels])
    except pa.ArrowException as error:
        raise DataError(
            f"{where}: labels are not of one type in all files ({error}). Import the files one by one."
        ) from error
    labels, names = read_labels(column, classes if classes is not None else next(iter(named)), where)
    groups = [(number, group) for number, part in enumerate(parts) for group in range(len(part.group_rows))]
    return HuggingFaceSource(
        name=os.path.basename(folder),
        classes=names,
        labels=labels,
        ids=pa.concat_arrays([part.ids for part in parts]),
        filesystem=filesystem,
        folder=folder,
        files=paths,
        image_column=image_column,
        first_row=np.cumsum([0, *(rows for part in parts for rows in part.group_rows)], dtype=np.int64)[:-1],
        group=np.array(groups, np.int64).reshape(-1, 2),
    )


class _Part(NamedTuple):
    """One Parquet file, without its images."""

    classes: tuple[str, ...] | None
    """Class names in the metadata of the file."""
    labels: list[pa.Array]
    """The column of labels, as chunks."""
    ids: pa.Array
    """Id of each image."""
    group_rows: list[int]
    """Number of rows of each row group."""


def _read_part(filesystem: pafs.FileSystem, folder: str, path: str, image_column: str, label_column: str) -> _Part:
    """Read the labels of one Parquet file, and check its columns.

    Raises:
        DataError: a column is missing or has another type.
    """
    with open_parquet(filesystem, path, [image_column, label_column]) as file:
        _check_image_type(file.schema_arrow.field(image_column).type, image_column, path)
        shown = os.path.relpath(path, folder).replace(os.sep, "/")
        numbers = pa.array(np.arange(file.metadata.num_rows)).cast(pa.string())
        return _Part(
            classes=_class_names(file.schema_arrow, label_column),
            labels=file.read([label_column])[label_column].chunks,
            ids=pc.binary_join_element_wise(shown, numbers, "/"),
            group_rows=[file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)],
        )


def _check_image_type(found: pa.DataType, column: str, path: str) -> None:
    """Check that a column of images is a struct with `bytes`.

    Raises:
        DataError: the column has another type.
    """
    names = {field.name: field.type for field in found} if pa.types.is_struct(found) else {}
    if not any(check(names.get("bytes", pa.null())) for check in (pa.types.is_binary, pa.types.is_large_binary)):
        raise DataError(
            f"{path}: column '{column}' is of type {found}, expected a struct with `bytes` (binary) and `path`. Name "
            "the column of the images."
        )


def _class_names(schema: pa.Schema, label_column: str) -> tuple[str, ...] | None:
    """Return the class names in the metadata of a file, or None if it has none."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label_column]
        return tuple(feature["names"]) if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None
