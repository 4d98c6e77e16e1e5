"""Decoding of PNG files by Pillow.

If libpng finds an error in a file, torchvision 0.29 ends the whole process (a segmentation fault): one flipped bit in
one image would end a worker, and then the one in its place.
"""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIGNATURE = b"\x89PNG\r\n\x1a\n"
"""First bytes of every PNG file."""


def decode_png(image: bytes | memoryview) -> Tensor:
    """Decode a PNG. A grey image gets three equal channels, 16 bits become 8, and transparency is dropped.

    Args:
        image: the bytes of the file, which begin with `SIGNATURE`.
    Returns:
        Shape (3, h, w), uint8, in the memory order (h, w, 3).
    Raises:
        RuntimeError: the file is damaged or incomplete, or has too many pixels.
    """
    try:
        for kind, content, checksum in chunks(image):
            # Pillow does not compare the checksums of pixels. Chunks in small letters are not needed to decode them.
            if kind.isupper() and zlib.crc32(content, zlib.crc32(kind)) != checksum:
                raise ValueError(f"chunk {kind.decode()} differs from its checksum")
        with Image.open(io.BytesIO(image), formats=("PNG",)) as opened:
            pixels_hwc = rgb_pixels(opened)
    except Exception as error:  # Pillow raises errors of many kinds for damaged files
        raise RuntimeError(f"Found a PNG that is damaged or incomplete: {error}.") from error
    return torch.from_numpy(pixels_hwc).permute(2, 0, 1)


def chunks(image: bytes | memoryview) -> Iterator[tuple[bytes, bytes | memoryview, int]]:
    """Yield kind, content and checksum of each chunk, as far as the last one.

    Raises:
        ValueError: the file ends before its last chunk.
    """
    place, kind = len(SIGNATURE), b""
    while kind != b"IEND":
        try:
            size, kind = struct.unpack_from(">I4s", image, place)
            (checksum,) = struct.unpack_from(">I", image, place + 8 + size)
        except struct.error as error:
            raise ValueError("it ends before its last chunk") from error
        yield kind, image[place + 8 : place + 8 + size], checksum
        place += 12 + size


def rgb_pixels(opened: Image.Image) -> np.ndarray:
    """Return the pixels of an image that Pillow has opened, in a mode that a PNG can have: shape (h, w, 3), uint8."""
    if opened.mode.startswith("I;16"):
        grey_hw = (np.asarray(opened) >> 8).astype(np.uint8)
        return np.repeat(grey_hw[:, :, None], 3, axis=2)
    if opened.mode == "P":  # Pillow warns about a palette with transparency unless the image becomes RGBA first
        return np.array(opened.convert("RGBA").convert("RGB"))
    return np.array(opened if opened.mode == "RGB" else opened.convert("RGB"))
