"""Small tables for the tests: row i of `numbered_table` has label i % classes, its pixels spell i."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from multitask.data import ImageTable, open_table, write_table

CLASSES = ["cat", "dog", "bird"]
MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
PLAIN: dict[str, Any] = {"resolution": 2, "mean": MEAN, "std": STD}
"""Options that leave the pixels of `numbered_table` as they are, but for the division by 255."""


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def number_image(number: int) -> bytes:
    """2x2 colour image whose pixels are `number` in base 256."""
    return png(np.broadcast_to(np.array([number // 65536, number // 256 % 256, number % 256], np.uint8), (2, 2, 3)))


def numbers(images_nchw: Any) -> list[int]:
    """What `number_image` was given, read back from a batch made with PLAIN."""
    return [int(c[0] * 65536 + c[1] * 256 + c[2]) for c in (images_nchw * 255).round()[:, :, 0, 0].tolist()]


def numbered_table(path: Path, rows: int, *, classes: int = 2, bad: tuple[int, ...] = (), shard: int = 5) -> ImageTable:
    """Written and opened; the rows in `bad` hold no image."""
    images = ((b"no image" if i in bad else number_image(i), i % classes) for i in range(rows))
    write_table(path, images, [f"class {i}" for i in range(classes)], rows_per_shard=shard)
    return open_table(path)


def encoded(table: ImageTable) -> list[bytes]:
    return [group.encoded(i).numpy().tobytes() for group in table.groups() for i in range(len(group))]


def rewrite_shard(directory: Path, shard: int, table: pa.Table) -> None:
    """Put another table in place of a shard and make the index agree with its bytes."""
    index = json.loads((directory / "index.json").read_text())
    entry = index["shards"][shard]
    pq.write_table(table, directory / entry["file"])
    content = (directory / entry["file"]).read_bytes()
    entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (directory / "index.json").write_text(json.dumps(index))


def small_table(path: Path) -> Path:
    """Written: 7 rows in shards of 3, 3 and 1, labels 0, 1, 2, 0, ..."""
    write_table(path, ((number_image(i), i % 3) for i in range(7)), CLASSES, rows_per_shard=3)
    return path
