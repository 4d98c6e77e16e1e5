"""Places-365, read from the list files that come with it."""

import os
import re
from collections.abc import Iterator

import numpy as np

from multitask.data.format import check_classes
from multitask.data.sources.files import FileSource, check_exist, check_paths, locate, path_array
from multitask.data.sources.labels import name_classes
from multitask.data.storage import DataError

CATEGORY = re.compile(r"/\w/(\S+) (\d+)")
IMAGE = re.compile(r"/?(\S+) (\d+)")


def places365(
    images: str | os.PathLike[str], file_list: str | os.PathLike[str], categories: str | os.PathLike[str]
) -> FileSource:
    """Return a source of the images of Places-365, in the order of its list of images.

    Args:
        images: folder that the listed paths start from, such as data_256_standard or val_256.
        file_list: places365_train_standard.txt (lines '/a/airfield/00000001.jpg 0'), places365_train_challenge.txt or
            places365_val.txt (lines 'Places365_val_00000001.jpg 165').
        categories: categories_places365.txt (lines '/a/airfield 0'). The class names leave out the letter, here '/a/'.
    Raises:
        DataError: a line has another form, a path leaves the folder, a category is unknown, or a file is missing.
    Source: Zhou et al., "Places: A 10 million Image Database for Scene Recognition", TPAMI 2017.
    """
    numbered = sorted((number, name) for name, number in _lines(categories, CATEGORY, "/a/airfield 0"))
    if [number for number, _ in numbered] != list(range(len(numbered))):
        raise DataError(
            f"{os.fspath(categories)}: category numbers are not 0 to {len(numbered) - 1}, each once. "
            "Use the list as it comes with Places-365."
        )
    names = check_classes([name for _, name in numbered], os.fspath(categories))
    where = os.fspath(file_list)
    paths, numbers = [], []
    for path, number in _lines(file_list, IMAGE, "/a/airfield/00000001.jpg 0"):
        paths.append(path)
        numbers.append(number)
    labels = np.array(numbers, np.int64)
    ids = path_array(paths, where)
    filesystem, root = locate(images)
    name_classes(labels, names, where)
    check_paths(ids, where)
    check_exist(filesystem, root, ids, where)
    name = os.path.splitext(os.path.basename(where))[0]
    return FileSource(name=name, classes=names, labels=labels, ids=ids, filesystem=filesystem, root=root)


def _lines(file: str | os.PathLike[str], pattern: re.Pattern[str], example: str) -> Iterator[tuple[str, int]]:
    """Yield the path or name, and the number, of each line of a list file."""
    path = os.path.expanduser(os.fspath(file))
    try:
        with open(path, encoding="utf-8") as lines:
            for count, line in enumerate(lines, 1):
                match = pattern.fullmatch(line.rstrip())
                if match is None:
                    raise DataError(
                        f"{path}, line {count}: found {line.rstrip()!r}, expected a line such as '{example}'. "
                        "Correct the line, or use the list as it comes with Places-365."
                    )
                yield match[1], int(match[2])
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read this list ({error}). Give the path of a Places-365 list.") from error
