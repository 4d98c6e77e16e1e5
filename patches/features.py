"""Feature files: Arrow files with one row of fixed size for each image.

A feature file is an uncompressed Arrow IPC file. Its columns are `row` (int64, the image's number in its table),
`label` (int64), and one fixed-size list for each feature with the values of one image in the order in which they lie in
memory. The schema's metadata describe the features. Because a row has a fixed size, it is read by seeking to its place.

MIST's maps travel in such files from a server to the edge, and training caches outputs of a frozen backbone in them.

This module needs pyarrow, so `import patches` does not import it.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from patches.errors import FeatureError
from patches.files import atomic_file
from patches.structure import dtype_name

FORMAT = 1
KEY = b"patches.features"
ROW, LABEL = "row", "label"
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class FeatureLayout:
    """How the values of one feature of one image lie in memory."""

    shape: tuple[int, ...]
    """Shape for one image, without the batch axis."""
    strides: tuple[int, ...]
    """Distance from one element to the next along each axis, counted in elements. The strides are stored so that
    channels_last maps stay channels_last."""
    dtype: str
    """A key of `DTYPES`."""

    @classmethod
    def of(cls, feature: Tensor) -> "FeatureLayout":
        """Return the layout of a feature, given a batch (batch, ...) of it.

        Raises:
            FeatureError: feature files cannot hold its dtype.
        """
        dtype = dtype_name(feature)
        if dtype not in DTYPES:
            raise FeatureError(f"Features of dtype {dtype} cannot be stored. Convert them to {' or '.join(DTYPES)}.")
        # A slice has gaps between its values and a broadcast tensor has overlaps. The stored layout has neither.
        whole = torch.empty_like(feature, device="meta")
        if whole.stride(0) != math.prod(feature.shape[1:]):
            whole = torch.empty(feature.shape, device="meta")
        return cls(tuple(feature.shape[1:]), whole.stride()[1:], dtype)

    @property
    def numbers(self) -> int:
        """Number of values for one image."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Number of bytes for one image."""
        return self.numbers * DTYPES[self.dtype].itemsize

    def flat(self, feature: Tensor) -> Tensor:
        """Return the values of each image in the order in which they lie in memory: (batch, numbers), on the CPU."""
        size, strides = feature.shape, (self.numbers, *self.strides)
        if feature.device.type != "cpu" or feature.stride() != strides:
            feature = torch.empty_strided(size, strides, dtype=feature.dtype).copy_(feature.detach())
        return feature.detach().as_strided((size[0], self.numbers), (self.numbers, 1))

    def empty(self, count: int) -> Tensor:
        """Return a batch of shape (count, *shape) whose values are not initialised."""
        return torch.empty_strided((count, *self.shape), (self.numbers, *self.strides), dtype=DTYPES[self.dtype])


@dataclass(frozen=True)
class Rows:
    """The features of n images."""

    rows: NDArray[np.int64]
    """Shape (n,): the images' numbers in their table."""
    labels: NDArray[np.int64]
    """Shape (n,)."""
    features: Mapping[str, Tensor]
    """Name of the feature -> tensor (n, ...)."""


def write_features(path: str | os.PathLike[str], about: Mapping[str, Any], batches: Iterable[Rows]) -> None:
    """Write a feature file atomically, with one batch in memory at a time.

    Args:
        path: the file to write.
        about: a description of the features for the reader of the file. JSON must be able to hold it.
        batches: one batch or more. All have the same features with the same shapes and dtypes.
    Raises:
        FeatureError: there is no batch, or feature files cannot hold a dtype.
        OSError: the folder cannot be written, or the disk is full.
    """
    waiting = iter(batches)
    first = next(waiting, None)
    if first is None:
        raise FeatureError(f"'{path}': there are no images to write features of. Give at least one.")
    layouts = {name: FeatureLayout.of(feature) for name, feature in first.features.items()}
    schema = _schema(layouts, about)
    with atomic_file(path) as file, pa.ipc.new_file(file, schema) as writer:
        batch: Rows | None = first
        while batch is not None:
            writer.write_batch(_record_batch(schema, layouts, batch))
            batch = next(waiting, None)


class FeatureFile:
    """A feature file that can be read row by row. Between reads it keeps no open file and no mapped memory.

    Attributes:
        path: the file.
        about: the description of the features that the writer gave.
        layouts: name of the feature -> its layout.
        rows: shape (images,), int64: the images' numbers in their table.
        labels: shape (images,), int64.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read everything but the features.

        Raises:
            FeatureError: there is no such file, or it is not a complete feature file of this format.
        """
        self.path = Path(path)
        try:
            with pa.memory_map(os.fspath(path)) as source, pa.ipc.open_file(source) as reader:
                described = json.loads((reader.schema.metadata or {})[KEY])
                if described["format"] != FORMAT:
                    raise FeatureError(
                        f"'{path}' is a feature file of format {described['format']!r}, and this version reads "
                        f"{FORMAT}. Write it again with this version."
                    )
                self.about: dict[str, Any] = described["about"]
                self.layouts = {
                    name: FeatureLayout(tuple(layout["shape"]), tuple(layout["strides"]), layout["dtype"])
                    for name, layout in described["layouts"].items()
                }
                self._read_places(source, reader)
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, FeatureError):
                raise
            raise FeatureError(
                f"'{path}' cannot be read as a feature file ({error}). Check the path, or write the file again."
            ) from error

    def _read_places(self, source: pa.MemoryMappedFile, reader: pa.ipc.RecordBatchFileReader) -> None:
        """Read the rows and labels, and note where the features of each record batch begin in the file."""
        source.seek(0)
        start = source.read_buffer(1).address
        rows, labels, sizes = [], [], []
        self._offsets: dict[str, list[int]] = {name: [] for name in self.layouts}
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            rows.append(batch.column(ROW).to_numpy().copy())
            labels.append(batch.column(LABEL).to_numpy().copy())
            sizes.append(batch.num_rows)
            for name, layout in self.layouts.items():
                values = batch.column(name).values.buffers()[1]
                if values.size < batch.num_rows * layout.row_bytes:
                    raise FeatureError(f"'{self.path}': its column '{name}' is too short. Write the file again.")
                self._offsets[name].append(values.address - start)
        self.rows: NDArray[np.int64] = np.concatenate(rows)
        self.labels: NDArray[np.int64] = np.concatenate(labels)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, name: str, places: Sequence[int] | NDArray[np.int64], out: Tensor, at: Sequence[int]) -> None:
        """Copy one feature of some images into a batch.

        Args:
            name: name of the feature.
            places: the images' numbers in this file, 0 to len - 1, in any order.
            out: a batch from `layouts[name].empty`.
            at: for each place, the image's number in the batch.
        Raises:
            OSError: the file is gone, or ends before the row does.
        """
        layout = self.layouts[name]
        flat = out.as_strided((len(out), layout.numbers), (layout.numbers, 1)).numpy().view(np.uint8)
        with open(self.path, "rb", buffering=0) as file:
            for place, number in zip(places, at, strict=True):
                batch = int(np.searchsorted(self._starts, place, side="right")) - 1
                file.seek(self._offsets[name][batch] + (int(place) - int(self._starts[batch])) * layout.row_bytes)
                wanted = memoryview(flat[number])
                while len(wanted):
                    got = file.readinto(wanted)
                    if not got:
                        raise OSError(f"'{self.path}' ends within its row {place}.")
                    wanted = wanted[got:]


def _schema(layouts: Mapping[str, FeatureLayout], about: Mapping[str, Any]) -> pa.Schema:
    described = {
        "format": FORMAT,
        "about": dict(about),
        "layouts": {name: asdict(layout) for name, layout in layouts.items()},
    }
    fields = [pa.field(ROW, pa.int64()), pa.field(LABEL, pa.int64())]
    fields += [
        pa.field(name, pa.list_(pa.from_numpy_dtype(layout.dtype), layout.numbers)) for name, layout in layouts.items()
    ]
    return pa.schema(fields, metadata={KEY: json.dumps(described)})


def _record_batch(schema: pa.Schema, layouts: Mapping[str, FeatureLayout], batch: Rows) -> pa.RecordBatch:
    arrays = [pa.array(batch.rows), pa.array(batch.labels)]
    for name, layout in layouts.items():
        values = pa.array(layout.flat(batch.features[name]).reshape(-1).numpy())
        arrays.append(pa.FixedSizeListArray.from_arrays(values, layout.numbers))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
