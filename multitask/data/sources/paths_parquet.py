"""Data sets given as Parquet files whose rows contain the path of an image file and its label."""

import os
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from multitask.data.sources.files import FileSource, check_exist, check_paths, locate
from multitask.data.sources.labels import read_labels
from multitask.data.sources.parquet import find_parquet, open_parquet
from multitask.data.storage import DataError


def paths_parquet(
    file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    path_column: str = "path",
    label_column: str = "label",
    root: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
) -> FileSource:
    """Return a source of the images that the rows of Parquet files name, in the order of the rows.

    Args:
        file: one or several Parquet files, folders or patterns, as local paths or as URIs that pyarrow knows.
        path_column: name of the column of paths. A path is relative to `root`, or absolute and below `root`.
        label_column: name of the column of class numbers or class names.
        root: folder of the images, as a local path or URI. None means the folder of the Parquet files.
        classes: class names. None gives the sorted names if labels are names, or else the numbers from 0 to the
            largest label as names.
    Raises:
        DataError: a column or an entry is missing or has another type, or a path leaves `root`, is listed twice or has
            no file.
    """
    filesystem, folder, files = find_parquet(file)
    columns = [path_column, label_column]
    tables = [open_parquet(filesystem, each, columns).read(columns) for each in files]
    where = f"{folder}: columns '{path_column}' and '{label_column}'" if len(files) > 1 else files[0]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
        paths = pa.concat_arrays(table[path_column].cast(pa.string()).chunks or [pa.array([], pa.string())])
    except pa.ArrowException as error:
        raise DataError(
            f"{where}: paths are not strings of one type in all files ({error}). Write the files anew with one type."
        ) from error
    labels, names = read_labels(table[label_column], classes, where)
    images, top = (filesystem, folder) if root is None else locate(root)
    prefix = top.rstrip("/") + "/"
    ids = pc.if_else(pc.starts_with(paths, prefix), pc.utf8_slice_codeunits(paths, len(prefix)), paths)
    check_paths(ids, where)
    check_exist(images, top, ids, where)
    name = os.path.basename(files[0]).removesuffix(".parquet") if len(files) == 1 else os.path.basename(folder)
    return FileSource(name=name, classes=names, labels=labels, ids=ids, filesystem=images, root=top)
