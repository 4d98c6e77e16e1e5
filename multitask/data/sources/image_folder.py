"""Data sets with one folder of images for each class, as ImageNet and torchvision's ImageFolder have them."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from multitask.data.format import check_classes
from multitask.data.sources.files import FileSource, is_hidden, list_counts, path_array
from multitask.data.sources.labels import name_classes
from multitask.data.sources.splits import check_no_splits
from multitask.data.storage import DataError
from patches.names import unknown_name_message

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of the files that count as images, in upper or lower case. The list is that of torchvision."""
HIDDEN = "hidden files and folders"
OUTSIDE_CLASSES = "images outside the class folders"
LINKS = "links to a folder that is read already"
"""Kinds of files and folders that are left aside, beside those of other endings."""


def image_folder(root: str | os.PathLike[str], classes: Sequence[str] | None = None) -> FileSource:
    """Return a source of the files root/CLASS/**/FILE, with the classes and order of torchvision.datasets.ImageFolder.

    Args:
        root: local folder that contains one folder for each class. Links are followed; each folder of a class is read
            once. The source counts what it leaves aside: hidden files and folders, files directly in the root, and
            files without the ending of an image.
        classes: names of the labels 0, 1, ... Some of them may have no folder. None gives the names of the folders,
            sorted.
    Raises:
        DataError: there is no class folder, the folders are splits, or one has no image or is not in `classes`.
    """
    top = os.path.abspath(os.path.expanduser(os.fspath(root)))
    left_aside: Counter[str] = Counter()
    folders = _class_folders(top, left_aside)
    if classes is None:
        check_no_splits(folders, top)
    names = check_classes(folders if classes is None else classes, top)
    label_of = {name: label for label, name in enumerate(names)}
    parts = []
    for folder in folders:
        if folder not in label_of:
            raise DataError(
                f"{top}: {unknown_name_message('class folder', folder, names)} Rename or remove the folder."
            )
        others: Counter[str] = Counter()
        paths = path_array(images_below(top, folder, others), top)
        if not len(paths):
            found = f", found {list_counts(others)}" if others else ""
            raise DataError(
                f"{top}: class folder '{folder}' has no image ({', '.join(EXTENSIONS)}){found}. "
                "Add images or remove the folder."
            )
        parts.append(paths)
        left_aside += others
    labels = np.repeat(np.array([label_of[folder] for folder in folders], np.int64), [len(part) for part in parts])
    return FileSource(
        name=os.path.basename(top),
        classes=name_classes(labels, names, top),
        labels=labels,
        ids=pa.concat_arrays(parts),
        filesystem=pafs.LocalFileSystem(),
        root=top,
        left_aside=dict(left_aside),
    )


def _class_folders(top: str, left_aside: Counter[str]) -> list[str]:
    """Return the names of the class folders, sorted, and count the other entries of the root.

    Raises:
        DataError: there is no such root, or it has no class folder.
    """
    if not os.path.isdir(top):
        raise DataError(f"{top} is no folder, expected one with a folder for each class. Check the path.")
    with os.scandir(top) as scanned:
        entries = sorted(scanned, key=lambda entry: entry.name)
    folders = []
    for entry in entries:
        kind = _kind_left_aside(entry.name, is_folder=entry.is_dir())
        if kind is None and entry.is_dir() and os.path.realpath(entry.path) == os.path.realpath(top):
            kind = LINKS
        if kind is None and entry.is_dir():
            folders.append(entry.name)
        else:
            left_aside[kind or OUTSIDE_CLASSES] += 1
    if not folders:
        raise DataError(f"{top}: found no folders, expected one for each class. Check the path.")
    return folders


def images_below(top: str, folder: str, left_aside: Counter[str]) -> list[str]:
    """Return the images in a folder of `top` and below: paths below `top`, with '/', in torchvision's order.

    In that order, the folders are sorted by their whole path, and then the files by name. Hidden files and folders and
    files without the ending of an image are counted in `left_aside`, by their kind.

    Raises:
        DataError: a folder cannot be listed.
    """
    images = []
    seen = {os.path.realpath(top), os.path.realpath(os.path.join(top, folder))}
    for parent, folders, files in os.walk(os.path.join(top, folder), followlinks=True, onerror=_refuse):
        folders[:] = _new_folders(parent, folders, seen, left_aside)
        for file in files:
            kind = _kind_left_aside(file, is_folder=False)
            if kind is None:
                images.append((os.path.relpath(parent, top), file))
            else:
                left_aside[kind] += 1
    return [f"{below}/{file}".replace(os.sep, "/") for below, file in sorted(images)]


def _new_folders(parent: str, folders: Iterable[str], seen: set[str], left_aside: Counter[str]) -> list[str]:
    """Return the folders that are neither hidden nor `seen`, and add them to `seen`. Real folders come before links."""
    new = []
    for folder in sorted(folders, key=lambda name: (os.path.islink(os.path.join(parent, name)), name)):
        real = os.path.realpath(os.path.join(parent, folder))
        if (kind := _kind_left_aside(folder, is_folder=True)) or real in seen:
            left_aside[kind or LINKS] += 1
        else:
            seen.add(real)
            new.append(folder)
    return new


def _kind_left_aside(name: str, *, is_folder: bool) -> str | None:
    """Return the kind under which a file or folder is counted as left aside, or None if its name says no such thing."""
    if is_hidden(name):
        return HIDDEN
    ending = os.path.splitext(name)[1].lower()
    if is_folder or ending in EXTENSIONS:
        return None
    return f"files {ending}" if ending else "files without an ending"


def _refuse(error: OSError) -> None:
    """Raise the error of a folder that cannot be listed. By default, os.walk would silently skip that folder."""
    raise DataError(f"{error.filename}: cannot list this folder ({error}). Correct its permissions.") from error
