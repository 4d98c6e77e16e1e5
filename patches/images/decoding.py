"""Decoding: from the bytes of an image file to its pixels, upright and in three channels.

Axes: c is the channel (red, green, blue), h and w are pixels.
"""

import re

from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from patches.images.orientation import read_orientation, upright
from patches.images.png import SIGNATURE, decode_png

SOURCE_LINE = re.compile(r"^.*\.cpp:\d+, ")
"""Matches how torchvision's errors begin: the function, and the line of its source on the machine that built it."""


def decode(encoded: Tensor) -> Tensor:
    """Decode one JPEG, PNG, WebP or GIF.

    The image is turned and mirrored as its EXIF orientation says. A grey image gets three equal channels, 16 bits for
    each value become 8, and transparency is dropped.

    Args:
        encoded: shape (bytes,), uint8.
    Returns:
        Shape (3, h, w), uint8.
    Raises:
        RuntimeError: the bytes are not a complete image of a known format, or are an animation.
    """
    content = encoded.numpy().data
    is_png = content[: len(SIGNATURE)] == SIGNATURE
    return upright(decode_png(content) if is_png else _decode_by_torchvision(encoded), read_orientation(content))


def _decode_by_torchvision(encoded: Tensor) -> Tensor:
    """Decode one JPEG, WebP or GIF, as `decode` does."""
    try:
        # torchvision 0.29 deprecates its decoders in favour of torchcodec. This is the only call of one of them.
        image_chw = decode_image(encoded, mode=ImageReadMode.RGB)
    except RuntimeError as error:
        reason = SOURCE_LINE.sub("", str(error).partition("\n")[0])
        raise RuntimeError(reason) from error
    if image_chw.ndim != 3:
        raise RuntimeError(f"Found an animation of {len(image_chw)} images, expected a single one.")
    return image_chw
