"""Classification data sets of torchvision.datasets that are already on disk."""

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from numpy.typing import NDArray
from PIL import Image

from multitask.data.classes import MULTI_LABEL
from multitask.data.sources.files import FileSource, check_exist, check_paths, path_array
from multitask.data.sources.interface import Source
from multitask.data.sources.labels import name_classes
from multitask.data.storage import DataError
from patches.names import unknown_name_message

PAIRS = ("samples", "_samples", "imgs")
FILES = ("_image_files", "_images")
LABELS = ("targets", "_labels", "labels", "y")
CLASSES = ("wnids", "classes", "categories")
"""Attributes in which the data sets of torchvision 0.29 keep their pairs of file and label, their files, their labels
and their class names. The first attribute that exists is used. `wnids` comes before `classes` because ImageNet's
`classes` are lists of synonyms, in which two classes are called 'crane'."""

DISK_ORDER = ("INaturalist", "Omniglot")
"""Data sets that cannot be imported: the order of their items depends on the disk, and an item has no file name."""


def torchvision_dataset(name: str, root: str | os.PathLike[str], **options: Any) -> Source:
    """Return a source of torchvision.datasets.NAME(root, **options), in the order of that data set.

    If the data set consists of image files, their bytes are used, and an id is the path of the file below `root`.
    Otherwise, each item becomes a PNG with the same pixels, and an id is the row number. Nothing is downloaded.

    Args:
        name: name of a class in torchvision.datasets, such as 'CIFAR10'.
        root: the argument `root` of that class.
        options: other arguments of that class, such as split='test' or train=False.
    Raises:
        DataError: the name is unknown, the data is not found under `root`, or an item is something other than an image
            with a class number.
    """
    dataset = _open(name, root, options)
    where = f"torchvision data set '{name}' in {os.fspath(root)}"
    if not len(dataset):
        raise DataError(f"{where} is empty, expected at least one image. Check root and options.")
    pairs = _first(dataset, PAIRS)
    files = [path for path, _ in pairs] if pairs else _first(dataset, FILES)
    labels = _labels(dataset, pairs, where)
    for row in sorted({0, len(dataset) // 2, len(dataset) - 1}):
        _check_item(dataset[row], int(labels[row]), row, where)
    found = _first(dataset, CLASSES)
    classes = name_classes(labels, None if found is None else [str(each) for each in found], where)
    if files is None or not isinstance(files[0], str | os.PathLike):
        ids = pa.array(map(str, range(len(dataset))), pa.string())
        return ItemSource(name=name, classes=classes, labels=labels, ids=ids, dataset=dataset)
    top = os.path.abspath(os.path.expanduser(os.fspath(root)))
    ids = path_array((os.path.abspath(file).removeprefix(top + os.sep).replace(os.sep, "/") for file in files), where)
    check_paths(ids, where)
    check_exist(pafs.LocalFileSystem(), top, ids, where)
    if name == "SUN397":  # the only data set of files whose order depends on the disk
        order = np.argsort(ids.to_numpy(zero_copy_only=False))
        ids, labels = ids.take(pa.array(order)), labels[order]
    return FileSource(name=name, classes=classes, labels=labels, ids=ids, filesystem=pafs.LocalFileSystem(), root=top)


@dataclass(frozen=True, eq=False)
class ItemSource:
    """A data set whose items are written as PNG."""

    name: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    ids: pa.Array
    dataset: Any
    notes: tuple[str, ...] = ()

    def read(self, rows: Sequence[int]) -> Iterator[bytes]:
        for row in rows:
            file = io.BytesIO()
            try:
                self.dataset[int(row)][0].save(file, "PNG", optimize=False)
            except OSError as error:
                raise DataError(
                    f"Image '{self.ids[int(row)]}' of torchvision data set '{self.name}': cannot write it as PNG "
                    f"({error}). Check the files under its root."
                ) from error
            yield file.getvalue()


def _open(name: str, root: str | os.PathLike[str], options: dict[str, Any]) -> Any:
    """Make torchvision's data set object without a download.

    Raises:
        DataError: the name is unknown, the data set cannot be imported, or it does not open.
    """
    from torchvision import datasets

    known = [each for each in datasets.__all__ if isinstance(getattr(datasets, each), type)]
    if name not in known:
        raise DataError(unknown_name_message("torchvision data set", name, known))
    if name in DISK_ORDER:
        raise DataError(
            f"torchvision data set '{name}' has another order on each machine. Import its folders with image_folder."
        )
    if "download" in options:
        raise DataError(
            f"torchvision data set '{name}': download is no option here. Call torchvision.datasets.{name}(..., "
            "download=True) once, then import what it left."
        )
    kind = getattr(datasets, name)
    offline = {"download": False} if "download" in signature(kind).parameters else {}
    try:
        return kind(os.path.expanduser(os.fspath(root)), **offline, **options)
    except (OSError, RuntimeError, TypeError, ValueError, ImportError) as error:
        raise DataError(
            f"torchvision data set '{name}' does not open in {os.fspath(root)} with options {options}: {error} "
            "Check root, the options and that the data set was downloaded."
        ) from error


def _first(dataset: Any, attributes: Sequence[str]) -> Any:
    """Return the first of these attributes that the data set has, or None if it has none of them."""
    return next((getattr(dataset, each) for each in attributes if getattr(dataset, each, None) is not None), None)


def _labels(dataset: Any, pairs: Any, where: str) -> NDArray[np.int64]:
    """Return the labels, shape (rows,). All images are decoded for them if the data set has no list of labels."""
    given = [label for _, label in pairs] if pairs else _first(dataset, LABELS)
    try:
        if given is None:
            given = [dataset[row][1] for row in range(len(dataset))]
        labels = np.asarray(given, np.int64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: labels are no class numbers ({error}). Choose a split with class labels.") from error
    if labels.ndim == 2:  # in QMNIST, the first column is the class, and the others are about the writer
        labels = labels[:, 0].copy()
    if labels.shape != (len(dataset),):
        raise DataError(
            f"{where}: labels have shape {labels.shape}, expected ({len(dataset)},). Choose a data set with one class "
            "for each image."
        )
    return labels


def _check_item(item: Any, label: int, row: int, where: str) -> None:
    """Check that an item is an image with a label, and that its label equals that of the data set's list.

    The two labels differ if an option of the data set changes labels.

    Raises:
        DataError: the item is something else, or its label differs.
    """
    parts = item if isinstance(item, tuple) else (item,)
    if len(parts) != 2 or not isinstance(parts[0], Image.Image):
        found = ", ".join(type(part).__name__ for part in parts)
        raise DataError(
            f"{where}: item {row} is ({found}), expected (PIL image, label). Choose a data set of labelled images and "
            "leave out options that change them."
        )
    if np.ndim(parts[1]) > 0:
        raise DataError(f"{where}: item {row} has {np.size(parts[1])} labels; {MULTI_LABEL}")
    if not np.array_equal(parts[1], label):
        raise DataError(
            f"{where}: item {row} has label {parts[1]!r}, but the data set's list says {label}. Leave out options that "
            "change images or labels."
        )
