"""The bytes of an image in a table: those of its file, unless training cannot read them or the image is too large."""

import io

import numpy as np
import torch
from PIL import Image

from multitask.data.storage import DataError
from patches.images import formats
from patches.images.decoding import decode
from patches.images.formats import encoded
from patches.quoting import shortened

JPEG_QUALITY = 95


def readable(image: bytes, name: str) -> bytes:
    """Return an encoded image in a format that training decodes.

    Args:
        image: the encoded image, as the data set has it.
        name: name of the image in messages.
    Returns:
        A BMP, PPM, PGM or TIFF as a PNG with the same pixels, upright; any other bytes unchanged. If they are no image,
        the task's `undecodable` says what happens to it in training.
    Raises:
        DataError: a BMP, PPM, PGM or TIFF cannot be decoded, has several pages, or has pixels of unknown range.
    """
    try:
        return formats.readable(image)
    except RuntimeError as error:
        raise _undecodable(name, error, "stored as PNG, which training can read", "convert it yourself") from error


def limit_side(image: bytes, max_side: int, name: str) -> bytes:
    """Scale an encoded image down, so that its longer side has at most `max_side` pixels.

    Args:
        image: the encoded image, in a format that training decodes.
        max_side: longest allowed side, in pixels.
        name: name of the image in messages.
    Returns:
        The same bytes if the image is small enough; else a JPEG of quality 95 with the pixels that training would see,
        scaled down.
    Raises:
        DataError: the image cannot be decoded.
    """
    try:
        # Pillow reads the size alone, and refuses sizes that no photo has before any memory is taken for them.
        with Image.open(io.BytesIO(image)) as opened:
            small = max(opened.size) <= max_side
        if small:
            return image
        pixels_chw = decode(torch.frombuffer(bytearray(image), dtype=torch.uint8))
    except Exception as error:  # Pillow raises errors of many kinds for damaged files
        raise _undecodable(name, error, "scaled down", "import without a maximum side") from error
    scaled = Image.fromarray(np.ascontiguousarray(pixels_chw.permute(1, 2, 0)))
    scaled.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    return encoded(scaled, "JPEG", quality=JPEG_QUALITY)


def _undecodable(name: str, error: Exception, why: str, instead: str) -> DataError:
    """Make the error for an image that has to be decoded for the import, and cannot be."""
    reason = shortened(str(error).partition("\n")[0])
    return DataError(
        f"{name}: found an image that cannot be decoded ({reason}), but it has to be decoded to be {why}. "
        f"Remove it from the source, or {instead}."
    )
