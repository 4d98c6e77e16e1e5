"""Encoded images of all kinds for the tests."""

import io
import struct
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image

from patches.images.png import SIGNATURE, chunks

ORIENTATION, MAKER = 0x0112, 0x010F
"""EXIF tags."""


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Shape (3, height, width), uint8."""
    small = Image.fromarray(pixels(4, 4, 3, seed=seed))
    return torch.from_numpy(np.array(small.resize((width, height), Image.Resampling.BICUBIC))).permute(2, 0, 1)


def encode(image: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def turned(image: np.ndarray, kind: str, orientation: int) -> bytes:
    """An image whose EXIF says how to turn it, and who made the camera."""
    exif = Image.Exif()
    exif[MAKER], exif[ORIENTATION] = "maker", orientation
    return encode(image, kind, exif=exif, **{"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 95}}[kind])


def tensor(content: bytes) -> torch.Tensor:
    """Shape (bytes,), uint8."""
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())


def split_png(image: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and content of each chunk."""
    return [(kind, bytes(content)) for kind, content, _ in chunks(image)]


def join_png(parts: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A PNG with right checksums, whatever its chunks hold."""
    sizes = ((struct.pack(">I", len(content)), kind + content) for kind, content in parts)
    return SIGNATURE + b"".join(size + chunk + struct.pack(">I", zlib.crc32(chunk)) for size, chunk in sizes)
