"""Arrow files of features: one row of fixed size for each image, read by seeking.

An uncompressed Arrow IPC file with the columns `row` (int64, the image's number in its table), `label` (int64) and one
fixed-size list for each feature: the numbers of one image as they lie in memory. The schema's metadata say what the
numbers are. A server sends MIST's maps this way, and training caches what a frozen backbone gives.

`import patches` leaves this module alone: it needs pyarrow.
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
    """How one feature of an image lies in memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Numbers (not bytes) from an element to the next one, for each axis: channels_last maps stay channels_last."""
    dtype: str

    @classmethod
    def of(cls, feature: Tensor) -> "FeatureLayout":
        """That of a batch (batch, ...).

        Raises:
            FeatureError: a dtype that these files do not hold.
        """
        dtype = dtype_name(feature)
        if dtype not in DTYPES:
            raise FeatureError(f"Features of dtype {dtype} cannot be stored. Convert them to {' or '.join(DTYPES)}.")
        # Gaps and overlaps, as a slice or a broadcast tensor has them, are not kept.
        whole = torch.empty_like(feature, device="meta")
        if whole.stride(0) != math.prod(feature.shape[1:]):
            whole = torch.empty(feature.shape, device="meta")
        return cls(tuple(feature.shape[1:]), whole.stride()[1:], dtype)

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        return self.numbers * DTYPES[self.dtype].itemsize

    def flat(self, feature: Tensor) -> Tensor:
        """The numbers of each image as they lie in memory, shape (batch, numbers), on the CPU."""
        size, strides = feature.shape, (self.numbers, *self.strides)
        if feature.device.type != "cpu" or feature.stride() != strides:
            feature = torch.empty_strided(size, strides, dtype=feature.dtype).copy_(feature.detach())
        return feature.detach().as_strided((size[0], self.numbers), (self.numbers, 1))

    def empty(self, count: int) -> Tensor:
        """A batch with any values, shape (count, *shape)."""
        return torch.empty_strided((count, *self.shape), (self.numbers, *self.strides), dtype=DTYPES[self.dtype])


@dataclass(frozen=True)
class Rows:
    """Some images: their numbers in their table and labels, shape (n,), int64, and features by name, (n, ...)."""

    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    features: Mapping[str, Tensor]


def write_features(path: str | os.PathLike[str], about: Mapping[str, Any], batches: Iterable[Rows]) -> None:
    """Write a file that appears whole or not at all; one batch is in memory at a time.

    Args:
        about: what the features are, for whoever reads them; JSON-able.
        batches: one or more, with the same features of the same shapes and dtypes.
    Raises:
        FeatureError: no batch, or a dtype that these files do not hold.
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
    """An opened file. It holds no descriptor and maps no page, so that what is read is all that is in memory."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises:
        FeatureError: no such file, or no whole feature file of this format.
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
        """Shape (images,): numbers in the image table."""
        self.labels: NDArray[np.int64] = np.concatenate(labels)
        """Shape (images,)."""
        self._starts = np.concatenate([[0], np.cumsum(sizes)])

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, name: str, places: Sequence[int] | NDArray[np.int64], out: Tensor, at: Sequence[int]) -> None:
        """Copy one feature of some images into a batch.

        Args:
            places: numbers of the images in this file, 0 to len - 1, in any order.
            out: a batch as `layouts[name].empty` makes it.
            at: for each place, the number in the batch.
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
