"""Formats of image files: those that `decode` reads, and those that Pillow reads and that become PNGs first."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from patches.images.png import SIGNATURE

DECODED = (b"\xff\xd8\xff", SIGNATURE, b"RIFF", b"GIF8")
"""First bytes of the files that `decode` reads: JPEG, PNG, WebP and GIF."""
CONVERTED = ("BMP", "PPM", "TIFF")
"""Pillow's names of the formats that become PNGs. A PGM is a PPM, too."""
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
"""Pillow's modes of pixels that a PNG stores as they are."""


def readable(image: bytes) -> bytes:
    """Return an encoded image in a format that `decode` reads.

    Returns:
        A BMP, PPM, PGM or TIFF as a PNG with the same pixels, upright; any other bytes unchanged.
    Raises:
        RuntimeError: a BMP, PPM, PGM or TIFF cannot be decoded, has several pages, or has pixels of unknown range.
    """
    if image.startswith(DECODED):
        return image
    try:
        with Image.open(io.BytesIO(image), formats=CONVERTED) as opened:
            pages = getattr(opened, "n_frames", 1)
            if pages > 1:
                raise ValueError(f"it has {pages} pages, expected one")
            opened.load()
            return encoded(png_image(opened), "PNG")
    except UnidentifiedImageError:
        return image
    except Exception as error:  # Pillow raises errors of many kinds for damaged files
        raise RuntimeError(str(error)) from error


def png_image(opened: Image.Image) -> Image.Image:
    """Return an image that Pillow has opened with its pixels in a mode that a PNG can have.

    Raises:
        ValueError: it is unknown which of the pixels' values are black and white.
    """
    if opened.mode in PNG_MODES:
        return opened
    if opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format == "PPM"):
        return Image.fromarray(np.asarray(opened).astype(np.uint16))
    if opened.mode in ("CMYK", "RGBX", "YCbCr"):
        return opened.convert("RGB")
    raise ValueError(f"its pixels are of Pillow's mode {opened.mode}, expected 1, 8 or 16 bits for each value")


def encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    """Encode an image, without the tags of the file that it comes from."""
    file = io.BytesIO()
    image.save(file, kind, exif=b"", **options)
    return file.getvalue()
