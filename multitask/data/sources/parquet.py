"""Finding and opening Parquet files, for the kinds of data sets that consist of them."""

import glob
import os
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from multitask.data.sources.files import locate
from multitask.data.sources.splits import check_one_split
from multitask.data.storage import DataError


def find_parquet(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> tuple[pafs.FileSystem, str, tuple[str, ...]]:
    """Find Parquet files.

    Args:
        files: one or several places: a Parquet file, a folder with such files at any depth, or a local pattern
            ('train-*.parquet'). All of them are local paths, or all are URIs of one file system.
    Returns:
        The file system, the folder that contains all files, and the files in order.
    Raises:
        DataError: a place has no Parquet file, the places are on several file systems, or the files belong to several
            splits of a data set.
    """
    given = [files] if isinstance(files, str | os.PathLike) else list(files)
    located = [locate(each) for each in given]
    if not located:
        raise DataError("Found an empty list of Parquet files, expected at least one. Give a file, folder or pattern.")
    filesystem = located[0][0]
    paths: list[str] = []
    for each, path in located:
        if each != filesystem:
            raise DataError(f"{path} is on another file system than {located[0][1]}. Import them one by one.")
        found = _files_at(filesystem, path)
        if not found:
            raise _nothing_found(filesystem, path)
        paths += found
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    check_one_split(paths, folder)
    return filesystem, folder, tuple(paths)


def _nothing_found(filesystem: pafs.FileSystem, path: str) -> DataError:
    """Make the error for a place without Parquet files."""
    if _files_at(filesystem, path, "arrow"):
        return DataError(
            f"{path}: found Arrow files as Hugging Face's `save_to_disk` writes them, expected Parquet files. Write "
            "each split as Parquet in Python, and import that file: "
            "`datasets.load_from_disk(FOLDER).to_parquet('train.parquet')`, or `load_from_disk(FOLDER)['train']` for a "
            "folder with several splits."
        )
    return DataError(f"{path}: found no Parquet file, expected one or more. Check the path or pattern.")


def _files_at(filesystem: pafs.FileSystem, path: str, ending: str = "parquet") -> list[str]:
    """Return the files of one ending at a place, sorted."""
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.File:
        return [path]
    if kind == pafs.FileType.Directory:
        inside = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
        return sorted(info.path for info in inside if info.is_file and info.extension == ending)
    return sorted(glob.glob(path)) if isinstance(filesystem, pafs.LocalFileSystem) else []


def open_parquet(filesystem: pafs.FileSystem, path: str, columns: Sequence[str]) -> pq.ParquetFile:
    """Open a Parquet file and check that it has the given columns.

    Raises:
        DataError: the file is missing or is not a Parquet file, or a column is missing.
    """
    try:
        file = pq.ParquetFile(path, filesystem=filesystem)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}). Copy it again.") from error
    for column in columns:
        if column not in file.schema_arrow.names:
            raise DataError(
                f"{path} has no column '{column}', found {file.schema_arrow.names}. Name the right columns."
            )
    return file
