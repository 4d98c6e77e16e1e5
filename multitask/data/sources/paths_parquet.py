"""Parquet tables whose rows name image files."""

import os
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from multitask.data.format import DataError
from multitask.data.sources.files import FileSource, check_exist, check_paths, locate
from multitask.data.sources.labels import read_labels
from multitask.data.sources.parquet import find_parquet, open_parquet


def paths_parquet(
    file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    path_column: str = "path",
    label_column: str = "label",
    root: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
) -> FileSource:
    """A source from Parquet rows of (path of an image file, label), in their order.

    Args:
        file: Parquet file, folder or pattern, local or a URI that pyarrow knows.
        path_column: strings, relative to `root` or absolute below it.
        label_column: class numbers or class names.
        root: folder of the images, local or a URI; without it, the folder of the Parquet.
        classes: class names; without them: sorted names where labels are names, else numbers as text.
    Raises:
        DataError: a column or an entry is missing or of another type; a path leaves `root`, comes twice or has no file.
    """
    filesystem, folder, files = find_parquet(file)
    columns = [path_column, label_column]
    tables = [open_parquet(filesystem, each, columns).read(columns) for each in files]
    where = f"{folder}: columns '{path_column}' and '{label_column}'" if len(files) > 1 else files[0]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
        paths = pa.concat_arrays(table[path_column].cast(pa.string()).chunks or [pa.array([], pa.string())])
    except pa.ArrowException as error:
        raise DataError(f"{where}: paths are not strings of one type in all files ({error}). Rewrite them.") from error
    labels, names = read_labels(table[label_column], classes, where)
    images, top = (filesystem, folder) if root is None else locate(root)
    prefix = top.rstrip("/") + "/"
    ids = pc.if_else(pc.starts_with(paths, prefix), pc.utf8_slice_codeunits(paths, len(prefix)), paths)
    check_paths(ids, where)
    check_exist(images, top, ids, where)
    name = os.path.basename(files[0]).removesuffix(".parquet") if len(files) == 1 else os.path.basename(folder)
    return FileSource(name=name, classes=names, labels=labels, ids=ids, filesystem=images, root=top)
