"""Image files below one folder, and the checks of their paths, for all sources that consist of files."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
from numpy.typing import NDArray

from multitask.data.storage import DataError

OUTSIDE = r"^$|^/|(^|/)\.\.(/|$)"
"""Matches a path that is empty, absolute, or contains '..'."""
TOOL_FOLDERS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN")
"""Folders in which macOS, Synology and Windows keep files of their own."""
CONVERTED_ENDINGS = (".bmp", ".pgm", ".ppm", ".tif", ".tiff")
"""Endings of the image files that a table stores as PNG."""
MOST_KINDS = 8
"""Number of kinds of files that a message lists."""


@dataclass(frozen=True, eq=False)
class FileSource:
    """A data set with one file for each image. The id of an image is its path below `root`, with '/'."""

    name: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    ids: pa.Array
    filesystem: pafs.FileSystem
    root: str
    left_aside: Mapping[str, int] = field(default_factory=dict)
    """Kind of file or folder below `root` that is left aside -> the number of them."""

    @property
    def notes(self) -> tuple[str, ...]:
        endings = pc.utf8_lower(pc.replace_substring_regex(self.ids, r"^.*(\.[^./]*)$", r"\1"))
        converted = endings.filter(pc.is_in(endings, value_set=pa.array(CONVERTED_ENDINGS)))
        counts = {entry["values"]: entry["counts"] for entry in converted.value_counts().to_pylist()}
        listed = {"Left aside": self.left_aside, "Stored as PNG, which training can read": counts}
        return tuple(f"{what}: {list_counts(kinds)}." for what, kinds in listed.items() if kinds)

    def read(self, rows: Sequence[int]) -> Iterator[bytes]:
        for row in rows:
            path = self.ids[int(row)].as_py()
            yield read_file(self.filesystem, f"{self.root}/{path}", path)


def list_counts(kinds: Mapping[str, int]) -> str:
    """Return kinds of files with their numbers, the most frequent ones first: "files .txt (12), links (1)"."""
    ordered = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    more = [f"{len(ordered) - MOST_KINDS} more kinds"] if len(ordered) > MOST_KINDS else []
    return ", ".join([f"{kind[:40]} ({count:,})" for kind, count in ordered[:MOST_KINDS]] + more)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is one that tools leave behind for themselves, and no part of a data set."""
    return name.startswith(".") or name in TOOL_FOLDERS


def read_file(filesystem: pafs.FileSystem, path: str, identity: str) -> bytes:
    """Return all bytes of a file.

    Args:
        filesystem: the file system.
        path: path of the file in it.
        identity: id of the image in messages.
    Raises:
        DataError: the file is missing, unreadable or empty.
    """
    try:
        # open_input_stream would decompress files whose names end in .gz.
        with filesystem.open_input_file(path) as file:
            content = file.read()
    except OSError as error:
        raise DataError(
            f"Image '{identity}': cannot read {path} ({error}). Restore the file, or import anew."
        ) from error
    if not content:
        raise DataError(f"Image '{identity}': {path} is empty, expected an encoded image. Restore or remove the file.")
    return content


def locate(path: str | os.PathLike[str]) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a local path or of a URI that pyarrow knows ('s3://...'), and the path in it.

    Raises:
        DataError: pyarrow has no file system for the URI.
    """
    text = os.fspath(path)
    if "://" not in text:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))
    try:
        return pafs.FileSystem.from_uri(text)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{text}: pyarrow cannot open this URI ({error}). Give a local path or another URI.") from error


def path_array(paths: Iterable[str], where: str) -> pa.Array:
    """Return paths as an array of type pa.string().

    Args:
        paths: the paths.
        where: name of the data set in messages.
    Raises:
        DataError: a file name is not valid UTF-8.
    """
    try:
        return pa.array(paths, pa.string())
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: file name {error.object!r} is not valid UTF-8. Rename the file.") from error


def check_paths(paths: pa.Array, where: str) -> None:
    """Check that every path stays inside its folder, and that no path is listed twice.

    Args:
        paths: paths below the images' folder.
        where: name of the data set in messages.
    Raises:
        DataError: a path is null, empty, absolute, contains '..', or is listed more than once.
    """
    outside = pc.fill_null(pc.match_substring_regex(paths, OUTSIDE), True)
    if (row := pc.index(outside, True).as_py()) >= 0:
        raise DataError(
            f"{where}: entry {row + 1} (counted from 1) has the path {paths[row].as_py()!r}, expected one below the "
            "images' folder, without '..'. Correct the path, or give the folder that the paths start from."
        )
    check_unique(paths, where)


def check_unique(ids: pa.Array, where: str) -> None:
    """Check that no image is listed twice.

    Args:
        ids: ids of the images.
        where: name of the data set in messages.
    Raises:
        DataError: an image is listed more than once.
    """
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counted = ids.value_counts()
    twice = counted.field("values").filter(pc.greater(counted.field("counts"), 1))
    raise DataError(
        f"{where}: '{twice[0].as_py()}' and {len(twice) - 1} more images are listed more than once, expected each "
        "once. Remove the copies from the list."
    )


def check_exist(filesystem: pafs.FileSystem, root: str, paths: pa.Array, where: str) -> None:
    """Check that every file exists below `root`. Each folder is listed once, which is faster than one query per file.

    Args:
        filesystem: the file system.
        root: folder that the paths start from.
        paths: paths below `root`.
        where: name of the data set in messages.
    Raises:
        DataError: files are missing. The message names the first one and says how many are missing.
    """
    folders = pc.unique(pc.replace_substring_regex(paths, "[^/]*$", "")).to_pylist()
    present = pa.array(
        (folder.encode() + name for folder in folders for name in _names_in(filesystem, f"{root}/{folder}")),
        pa.large_binary(),
    )
    missing = paths.filter(pc.invert(pc.is_in(paths.cast(pa.large_binary()), value_set=present)))
    if len(missing):
        raise DataError(
            f"{where}: {len(missing)} of {len(paths)} files are missing below {root}, first '{missing[0].as_py()}'. "
            "Unpack all images there, or give the folder that the paths start from."
        )


def _names_in(filesystem: pafs.FileSystem, folder: str) -> list[bytes]:
    """Return the names of the files and folders in a folder; an empty list if it does not exist."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        try:
            return os.listdir(os.fsencode(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
    found = filesystem.get_file_info(pafs.FileSelector(folder.rstrip("/"), allow_not_found=True))
    return [info.base_name.encode() for info in found]
