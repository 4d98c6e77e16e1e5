"""Small pictures of a table's images, for pages that show them."""

import io

import numpy as np
import torch
from PIL import Image

from patches.images.decoding import decode


def thumbnail(image: bytes, side: int) -> bytes:
    """Return a picture of an image whose longer side has about `side` pixels, upright, as training sees it.

    Args:
        image: an encoded image that `decode` can read.
        side: pixels, at least 1.
    Returns:
        A JPEG of a larger image. A smaller one is a PNG in which each pixel is a square, so that it stays sharp.
    Raises:
        RuntimeError: the image cannot be decoded.
    """
    pixels_chw = decode(torch.frombuffer(bytearray(image), dtype=torch.uint8))
    picture = Image.fromarray(np.ascontiguousarray(pixels_chw.permute(1, 2, 0)))
    buffer = io.BytesIO()
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.BICUBIC)
        picture.save(buffer, "JPEG", quality=85)
    else:
        times = side // max(picture.size)
        picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()
