"""Splits of a data set, recognised by the names of files and folders, so that they are not imported as one table."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from multitask.data.storage import DataError

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""A name that people give to a split -> the name of its table."""
SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}.*\.parquet")
"""Matches a file name as the Hugging Face Hub gives it. It starts with the name of the split."""
FIRST_WORD = re.compile(r"(?:partial-)?([a-z]+)")
"""Matches the start of a name. The Hub writes 'partial-' before a split of which it converted a part."""


def check_one_split(paths: Sequence[str], folder: str) -> None:
    """Check that files belong to one split of a data set, as far as their names and folders say.

    Args:
        paths: the files.
        folder: the folder that contains them all.
    Raises:
        DataError: the files belong to several splits.
    """
    files = defaultdict(list)
    for path in paths:
        files[_split_of_file(os.path.relpath(path, folder))].append(path)
    splits = sorted(split for split in files if split is not None)
    if len(splits) > 1:
        raise DataError(
            f"{folder} has the splits {splits}, expected one. Import each split as a table of its own. The files of "
            f"split '{splits[0]}' are '{_place_of(files[splits[0]], folder)}'."
        )


def _split_of_file(path: str) -> str | None:
    """Return the split that the name of a file, or else of the folders around it, speaks of."""
    parts = path.split(os.sep)
    if match := SHARD.fullmatch(parts[-1]):
        return SPLITS.get(match[1], match[1])
    words = (FIRST_WORD.match(part.lower()) for part in reversed(parts))
    return next((SPLITS[word[1]] for word in words if word and word[1] in SPLITS), None)


def _place_of(paths: Sequence[str], folder: str) -> str:
    """Return a folder, file or pattern that names these files."""
    inside = os.path.commonpath([os.path.dirname(path) for path in paths])
    if inside != folder:
        return inside
    if len(paths) == 1:
        return paths[0]
    return f"{os.path.commonprefix(paths)}*{os.path.splitext(paths[0])[1]}"  # noqa: RUF071


def check_no_splits(folders: Iterable[str], root: str) -> None:
    """Check that the folders in the root of an image folder are classes, and not splits.

    Args:
        folders: their names.
        root: path of the root.
    Raises:
        DataError: all of them have the names of splits, or at least two of them.
    """
    names = list(folders)
    splits = {name: SPLITS[name.lower()] for name in names if name.lower() in SPLITS}
    if len(splits) >= min(2, len(names)):
        commands = "; ".join(f"`{root}/{name}` as TABLE/{table}" for name, table in splits.items())
        raise DataError(
            f"{root}: found the splits {sorted(splits)}, expected one folder for each class. Import each split as a "
            f"table of its own: {commands}. If they are classes, name them in a file of class names."
        )
