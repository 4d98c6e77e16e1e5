"""Folders of images, one for each class: the layout of ImageNet and of torchvision's ImageFolder."""

import os
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from multitask.data.format import DataError, check_classes
from multitask.data.sources.files import FileSource, path_array
from multitask.data.sources.labels import name_classes
from patches.names import unknown_name_message

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of the files that count as images, in any case, as in torchvision."""


def image_folder(root: str | os.PathLike[str], classes: Sequence[str] | None = None) -> FileSource:
    """A source from root/CLASS/**/file, with the classes and the order of torchvision.datasets.ImageFolder.

    Args:
        root: local folder whose folders are the classes; files directly in it, and files that are no images by their
            ending, are ignored. Links are followed.
        classes: names for label 0, 1, ...; a class may have no folder. Without them: the folders, sorted.
    Raises:
        DataError: there is no class folder, one has no image or is not in `classes`.
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
    """Paths below `top`, with '/', in torchvision's order: folders by their whole path, then files by name."""
    walk = os.walk(os.path.join(top, folder), followlinks=True, onerror=_refuse)
    for parent, _, files in sorted(walk):
        below = os.path.relpath(parent, top).replace(os.sep, "/")
        yield from (f"{below}/{file}" for file in sorted(files) if file.lower().endswith(EXTENSIONS))


def _refuse(error: OSError) -> None:
    """os.walk would leave out a folder that it cannot list."""
    raise DataError(f"{error.filename}: cannot list this folder ({error}). Correct its permissions.") from error
