"""Data sets on disk for the tests: tiny images, each with its own bytes, and the checks that hold for every source."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa

from multitask.data.sources import Source
from tests.multitask.data.tables import png


def image(number: int, kind: str = "JPEG") -> bytes:
    return png(np.full((4, 4, 3), number % 256, np.uint8), kind)


def write_images(root: Path, paths: list[str]) -> list[bytes]:
    """File i holds `image(i)`."""
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(image(number))
    return [image(number) for number in range(len(paths))]


def check_source(source: Source, images: list[bytes], labels: list[int], ids: list[str]) -> None:
    """The source hands over exactly this, in any order, before and after a journey to another process."""
    assert source.ids.type == pa.string()
    assert source.labels.dtype == np.int64
    assert source.ids.to_pylist() == ids
    assert source.labels.tolist() == labels
    assert list(source.read(range(len(images)))) == images
    buffers: list[pickle.PickleBuffer] = []
    packed = pickle.dumps(source, protocol=5, buffer_callback=buffers.append)
    # Ray carries the buffers past the pickle: what grows with the rows has to be in them.
    assert not any(identity.encode() in packed for identity in ids if len(identity) > 4)
    there = pickle.loads(packed, buffers=buffers)
    rows = [*reversed(range(len(images))), 0, 0]
    assert list(there.read(rows)) == [images[row] for row in rows]
    assert list(there.read(np.array(rows))) == [images[row] for row in rows]
    assert there.classes == source.classes
    assert there.ids.equals(source.ids)
    assert list(there.read([])) == []
