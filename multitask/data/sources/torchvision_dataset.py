"""Any classification data set of torchvision.datasets that is on disk: its files' bytes, or its pixels as PNG."""

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

from multitask.data.format import DataError
from multitask.data.sources.files import FileSource, check_exist, check_paths, path_array
from multitask.data.sources.interface import Source
from multitask.data.sources.labels import name_classes
from patches.names import unknown_name_message

PAIRS = ("samples", "_samples", "imgs")
FILES = ("_image_files", "_images")
LABELS = ("targets", "_labels", "labels", "y")
CLASSES = ("wnids", "classes", "categories")
"""Attributes that torchvision 0.29's data sets keep their files, labels and class names in, the best first. `wnids`:
ImageNet's class names are synonyms, and two of its classes are called 'crane'."""

DISK_ORDER = ("INaturalist", "Omniglot")
"""Their files come in the order in which this machine's disk lists them, and their items do not tell the file."""


def torchvision_dataset(name: str, root: str | os.PathLike[str], **options: Any) -> Source:
    """A source from torchvision.datasets.NAME(root, **options), in that data set's order.

    Data sets of image files hand over the files as they are; ids are the files' paths below `root`. The others hand
    over each item as a PNG of the same pixels; ids are the row numbers. Nothing is downloaded.

    Args:
        name: class in torchvision.datasets, such as 'CIFAR10'.
        root: what the class calls root.
        options: its other arguments, such as split='test' or train=False.
    Raises:
        DataError: unknown name, data not found under `root`, or items other than an image with a class number.
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
    if name == "SUN397":  # The one of these that lists its files in the disk's order.
        order = np.argsort(ids.to_numpy(zero_copy_only=False))
        ids, labels = ids.take(pa.array(order)), labels[order]
    return FileSource(name=name, classes=classes, labels=labels, ids=ids, filesystem=pafs.LocalFileSystem(), root=top)


@dataclass(frozen=True, eq=False)
class ItemSource:
    """Items of a data set as PNG."""

    name: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    ids: pa.Array
    dataset: Any

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
    """The first of these attributes that the data set has, or None."""
    return next((getattr(dataset, each) for each in attributes if getattr(dataset, each, None) is not None), None)


def _labels(dataset: Any, pairs: Any, where: str) -> NDArray[np.int64]:
    """Shape (rows,). Only a data set that keeps no list of labels decodes its images for them."""
    given = [label for _, label in pairs] if pairs else _first(dataset, LABELS)
    try:
        if given is None:
            given = [dataset[row][1] for row in range(len(dataset))]
        labels = np.asarray(given, np.int64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: labels are no class numbers ({error}). Choose a split with class labels.") from error
    if labels.ndim == 2:  # QMNIST: the first column is the class, the others tell who wrote the digit.
        labels = labels[:, 0].copy()
    if labels.shape != (len(dataset),):
        raise DataError(
            f"{where}: labels have shape {labels.shape}, expected ({len(dataset)},). Choose a data set with one class "
            "for each image."
        )
    return labels


def _check_item(item: Any, label: int, row: int, where: str) -> None:
    """An item is what a source can hand over, and options did not give it another label than the list's."""
    parts = item if isinstance(item, tuple) else (item,)
    if len(parts) != 2 or not isinstance(parts[0], Image.Image):
        found = ", ".join(type(part).__name__ for part in parts)
        raise DataError(
            f"{where}: item {row} is ({found}), expected (PIL image, label). Choose a data set of labelled images and "
            "leave out options that change them."
        )
    if not np.array_equal(parts[1], label):
        raise DataError(
            f"{where}: item {row} has label {parts[1]!r}, but the data set's list says {label}. Leave out options that "
            "change images or labels."
        )
