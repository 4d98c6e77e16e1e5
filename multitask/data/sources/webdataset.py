"""WebDataset tars. The headers of each tar are read once; later, images are read at their offsets."""

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from multitask.data.classes import MULTI_LABEL, REGRESSION
from multitask.data.sources.files import check_unique, is_hidden, path_array
from multitask.data.sources.labels import name_classes
from multitask.data.sources.splits import check_one_split
from multitask.data.storage import DataError
from patches.quoting import quoted

SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
"""Matches the key and the ending of a member, split at the first dot of its base name, as in the webdataset library."""
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
"""First two bytes of a compressed file -> name of the compression."""


@dataclass(frozen=True, eq=False)
class WebDatasetSource:
    """Images inside uncompressed tars. The id of an image is TAR/KEY."""

    name: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    ids: pa.Array
    tars: tuple[str, ...]
    tar: NDArray[np.int32]
    """Position in `tars` of the tar that contains each image, shape (rows,)."""
    offset_bytes: NDArray[np.int64]
    """Offset of each image in its tar, shape (rows,)."""
    size_bytes: NDArray[np.int64]
    """Size of each image, shape (rows,)."""
    notes: tuple[str, ...] = ()

    def read(self, rows: Sequence[int]) -> Iterator[bytes]:
        for tar, of_tar in groupby(rows, key=lambda row: int(self.tar[row])):
            path, asked = self.tars[tar], [int(row) for row in of_tar]
            row = asked[0]
            try:
                with open(path, "rb") as file:
                    for row in asked:
                        file.seek(self.offset_bytes[row])
                        content = file.read(self.size_bytes[row])
                        if len(content) != self.size_bytes[row]:
                            raise OSError(f"{len(content)} of {self.size_bytes[row]} bytes are left")
                        yield content
            except OSError as error:
                raise DataError(
                    f"Image '{self.ids[row]}': cannot read it from {path} ({error}). Restore the tar, or import anew."
                ) from error


def webdataset(
    tars: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    classes: Sequence[str] | None = None,
    image_keys: Sequence[str] = ("jpg", "jpeg", "png", "webp", "img"),
    label_key: str = "cls",
) -> WebDatasetSource:
    """Return a source of the samples of local WebDataset tars, in the order of the tars and of the samples in them.

    Args:
        tars: one or several places: a tar, a folder of tars, or a pattern ('train-{000000..000146}.tar',
            'train-*.tar').
        classes: class names. None gives the numbers from 0 to the largest label as names.
        image_keys: endings of image members, without the dot. If a sample has several of them, the first one in this
            list is used.
        label_key: ending of the member that contains the class number as text. A sample without this member needs a
            .json member with the class number under "label".
    Raises:
        DataError: no tar is found; a tar is compressed, incomplete, or has a key twice; or a sample has no image or no
            label.
    """
    given = [tars] if isinstance(tars, str | os.PathLike) else list(tars)
    paths = [path for each in given for path in _expand(os.path.expanduser(os.fspath(each)))]
    where = f"WebDataset {', '.join(os.fspath(each) for each in given[:3])}"
    if not paths:
        raise DataError(f"{where}: found no tars, expected at least one. Check the path or pattern.")
    top = os.path.commonpath([os.path.dirname(path) for path in paths])
    parts, ids, counts = [], [], []
    for path in paths:
        samples = list(_samples(path, tuple(image_keys), label_key))
        shown = os.path.relpath(path, top).replace(os.sep, "/")
        ids.append(path_array((f"{shown}/{key}" for key, *_ in samples), path))
        check_unique(ids[-1], path)
        parts.append(np.array([numbers for _, *numbers in samples], np.int64).reshape(-1, 3))
        counts.append(len(samples))
    offsets, sizes, labels = (np.ascontiguousarray(column) for column in np.concatenate(parts).T)
    all_ids = pa.concat_arrays(ids)
    check_unique(all_ids, where)
    return WebDatasetSource(
        name=os.path.basename(top),
        classes=name_classes(labels, classes, where),
        labels=labels,
        ids=all_ids,
        tars=tuple(paths),
        tar=np.repeat(np.arange(len(paths), dtype=np.int32), counts),
        offset_bytes=offsets,
        size_bytes=sizes,
    )


def _expand(pattern: str) -> list[str]:
    """Return the absolute paths of the tars at one place."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise DataError(f"{pattern}: tars are read from local disk only. Copy them, then give the local path.")
    pattern = os.path.abspath(pattern)
    if os.path.isdir(pattern):
        tars = sorted(glob.glob(os.path.join(glob.escape(pattern), "*.tar")))
        check_one_split(tars, pattern)
        return tars
    if os.path.exists(pattern):
        return [pattern]
    # Braces are expanded as a shell does: the pieces are text, first number, last number, text, and so on.
    pieces = BRACES.split(pattern)
    choices = [_numbers(first, last) for first, last in zip(pieces[1::3], pieces[2::3], strict=True)]
    paths: list[str] = []
    for chosen in product(*choices):
        path = pieces[0] + "".join(number + text for number, text in zip(chosen, pieces[3::3], strict=True))
        found = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
        paths += found
    return paths


def _numbers(first: str, last: str) -> list[str]:
    """Return the numbers from `first` to `last` as a shell does: padded with zeros if one of them starts with zero."""
    padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def _samples(path: str, image_keys: tuple[str, ...], label_key: str) -> Iterator[tuple[str, int, int, int]]:
    """Yield key, image offset in bytes, image size in bytes, and label of each sample of one tar."""
    key = "(none yet)"
    try:
        with open(path, "rb") as file:
            if packed := PACKED.get(file.read(2)):
                raise DataError(f"{path} is compressed ({packed}), expected a plain tar. Decompress it first.")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members: dict[str, tarfile.TarInfo] = {}
                files: dict[str, tarfile.TarInfo] = {}
                for member in tar:
                    if member.isreg():
                        files[member.name] = member
                    match = SAMPLE.fullmatch(member.name)
                    if member.isdir() or match is None or _is_left_aside(member.name):
                        continue
                    content = files[member.name] = _content(path, member, files)
                    if members and match[1] != key:
                        yield _sample(tar, path, key, members, image_keys, label_key)
                        members = {}
                    key, ending = match[1], match[2].lower()
                    if ending in members:
                        raise DataError(f"{path}: sample '{key}' has '.{ending}' twice. Write the tar anew.")
                    members[ending] = content
                # tarfile treats a damaged header as the end of the tar, unless it is the first header.
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("no end mark")
                if members:
                    yield _sample(tar, path, key, members, image_keys, label_key)
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"{path}: cannot be read past sample '{key}' ({error}): it is missing, cut short or no tar. Copy it again."
        ) from error


def _is_left_aside(name: str) -> bool:
    """Return whether a member is hidden, or describes the tar itself. The webdataset library skips the latter."""
    is_note = "/" not in name and name.startswith("__") and name.endswith("__")
    return is_note or any(is_hidden(part) for part in name.removeprefix("./").split("/"))


def _content(path: str, member: tarfile.TarInfo, files: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """Return the file that has the content of a member: the member itself, or an earlier one if it is a hard link.

    Args:
        path: the tar.
        files: name -> file, up to this member.
    Raises:
        DataError: the member is no file, and no hard link to a file before it.
    """
    if not member.isreg() and (not member.islnk() or member.linkname not in files):
        raise DataError(
            f"{path}: member '{member.name}' links to '{member.linkname}', expected a file, or a hard link to a file "
            "before it. Write the tar with the files that the links lead to (tar --dereference)."
        )
    return member if member.isreg() else files[member.linkname]


def _sample(
    tar: tarfile.TarFile,
    path: str,
    key: str,
    members: dict[str, tarfile.TarInfo],
    image_keys: tuple[str, ...],
    label_key: str,
) -> tuple[str, int, int, int]:
    """Return key, image offset in bytes, image size in bytes, and label of one sample.

    Raises:
        DataError: the sample has no image or no label.
    """
    image = next((members[ending] for ending in image_keys if ending in members), None)
    if image is None or not image.size:
        raise DataError(
            f"{path}: sample '{key}' has {sorted(members)}, expected an image that is not empty under one of "
            f"{list(image_keys)}. Name its ending in image_keys, or write the tar without this sample."
        )
    holder = members.get(label_key) or members.get("json")
    if holder is None:
        raise DataError(
            f"{path}: sample '{key}' has {sorted(members)}, expected a label in '{label_key}' or 'json'. Name its "
            "ending in label_key, or write the tar without this sample."
        )
    content = tar.extractfile(holder)
    assert content is not None, "regular members have content"
    text = content.read()
    try:
        label = int(text) if label_key in members else json.loads(text)["label"]
        reason = {list: MULTI_LABEL, float: REGRESSION}.get(type(label))
        if reason is None and type(label) is not int:
            raise TypeError("no integer")
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}: sample '{key}' has the label {text[:80]!r}, expected a class number. Write the tar with numbers."
        ) from error
    if reason is not None:
        raise DataError(f"{path}: sample '{key}' has the label {quoted(label)}; {reason}")
    return key, image.offset_data, image.size, label
