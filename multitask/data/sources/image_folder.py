"""Data sets with one folder of images for each class, as ImageNet and torchvision's ImageFolder have them."""

import os
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from multitask.data.format import check_classes
from multitask.data.sources.files import FileSource, path_array
from multitask.data.sources.labels import name_classes
from multitask.data.storage import DataError
from patches.names import unknown_name_message

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of the files that count as images, in upper or lower case. The list is that of torchvision."""


def image_folder(root: str | os.PathLike[str], classes: Sequence[str] | None = None) -> FileSource:
    """Return a source of the files root/CLASS/**/FILE, with the classes and order of torchvision.datasets.ImageFolder.

    Args:
        root: local folder that contains one folder for each class. Files directly in it, and files without the ending
            of an image, are ignored. Links are followed.
        classes: names of the labels 0, 1, ... Some of them may have no folder. None gives the names of the folders,
            sorted.
    Raises:
        DataError: there is no class folder, or one has no image or is not in `classes`.
    """
    top = os.path.abspath(os.path.expanduser(os.fspath(root)))
    if not os.path.isdir(top):
        raise DataError(f"{top} is no folder, expected one with a folder for each class. Check the path.")
    with os.scandir(top) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir())
    if not folders:
        raise DataError(f"{top}: found no folders, expected one for each class. Check the path.")
    names = check_classes(folders if classes is None else classes, top)
    label_of = {name: label for label, name in enumerate(names)}
    parts = []
    for folder in folders:
        if folder not in label_of:
            raise DataError(
                f"{top}: {unknown_name_message('class folder', folder, names)} Rename or remove the folder."
            )
        paths = path_array(_images(top, folder), top)
        if not len(paths):
            raise DataError(
                f"{top}: class folder '{folder}' has no image ({', '.join(EXTENSIONS)}). "
                "Add images or remove the folder."
            )
        parts.append(paths)
    labels = np.repeat(np.array([label_of[folder] for folder in folders], np.int64), [len(part) for part in parts])
    return FileSource(
        name=os.path.basename(top),
        classes=name_classes(labels, names, top),
        labels=labels,
        ids=pa.concat_arrays(parts),
        filesystem=pafs.LocalFileSystem(),
        root=top,
    )


def _images(top: str, folder: str) -> Iterator[str]:
    """Yield paths below `top`, with '/', in torchvision's order: folders by their whole path, then files by name."""
    walk = os.walk(os.path.join(top, folder), followlinks=True, onerror=_refuse)
    for parent, _, files in sorted(walk):
        below = os.path.relpath(parent, top).replace(os.sep, "/")
        yield from (f"{below}/{file}" for file in sorted(files) if file.lower().endswith(EXTENSIONS))


def _refuse(error: OSError) -> None:
    """Raise the error of a folder that cannot be listed. By default, os.walk would silently skip that folder."""
    raise DataError(f"{error.filename}: cannot list this folder ({error}). Correct its permissions.") from error
