"""EXIF orientation: how a camera says that an image has to be turned or mirrored before it is shown.

It is a tag in a TIFF structure. JPEG, PNG and WebP files have this structure in a block of their own.
"""

import struct
import zlib

from torch import Tensor

from patches.images.png import SIGNATURE as PNG

TAG = 0x0112
AS_STORED = 1
"""The orientation of an image that is shown as it is stored."""
REVERSED = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}
"""Orientation -> axes that are reversed (-2: height, -1: width), after 5 to 8 have swapped height and width."""
JPEG, TIFF = b"\xff\xd8", (b"II*\0", b"MM\0*")
"""The first bytes of these formats."""
EXIF_HEADER = b"Exif\0\0"

Encoded = bytes | bytearray | memoryview


def upright(image_chw: Tensor, orientation: int) -> Tensor:
    """Turn and mirror an image of shape (c, h, w) as its orientation says. 5 to 8 swap height and width."""
    if orientation >= 5:
        image_chw = image_chw.transpose(-2, -1)
    return image_chw.flip(REVERSED[orientation]) if orientation in REVERSED else image_chw


def read_orientation(image: Encoded) -> int:
    """Return the EXIF orientation of an encoded image, 1 to 8. It is 1 if the image has none or a damaged one."""
    found = _find(image)
    if found is None:
        return AS_STORED
    place, order = found
    (value,) = struct.unpack_from(f"{order}H", image, place)
    return value if 1 <= value <= 8 else AS_STORED


def without_orientation(image: bytes) -> bytes:
    """Return an encoded image with the orientation `AS_STORED`. Its pixels and all of its other tags are unchanged."""
    found = _find(image)
    if found is None:
        return image
    place, order = found
    changed = bytearray(image)
    struct.pack_into(f"{order}H", changed, place, AS_STORED)
    if image.startswith(PNG):
        start, stop = _in_png(image) or (0, 0)
        struct.pack_into(">I", changed, stop, zlib.crc32(changed[start - 4 : stop]))
    return bytes(changed)


def _find(image: Encoded) -> tuple[int, str] | None:
    """Return the place of the orientation's two bytes, and their byte order as `struct` writes it."""
    try:
        block = _exif_block(image)
        if block is None:
            return None
        start, stop = block
        order = {b"II": "<", b"MM": ">"}[bytes(image[start : start + 2])]
        directory = start + struct.unpack_from(f"{order}I", image, start + 4)[0]
        (tags,) = struct.unpack_from(f"{order}H", image, directory)
        for entry in range(directory + 2, min(directory + 2 + 12 * tags, stop - 11), 12):
            if struct.unpack_from(f"{order}H", image, entry)[0] == TAG:
                return entry + 8, order
    except (struct.error, KeyError):
        pass  # the file or its tags are damaged
    return None


def _exif_block(image: Encoded) -> tuple[int, int] | None:
    """Return the start and the end of the TIFF structure in a file, or None if the file has none.

    Raises:
        struct.error: the file is cut off.
    """
    if image[:2] == JPEG:
        return _in_jpeg(image)
    if image[:8] == PNG:
        return _in_png(image)
    if image[:4] == b"RIFF" and image[8:16] == b"WEBPVP8X":  # the only kind of WebP that has further blocks
        return _in_webp(image)
    return (0, len(image)) if image[:4] in TIFF else None


def _in_jpeg(image: Encoded) -> tuple[int, int] | None:
    place, app1, start_of_scan, fill = 2, 0xFFE1, 0xFFDA, 0xFFFF
    while True:
        marker, size = struct.unpack_from(">HH", image, place)
        if marker == fill:  # any number of these bytes may come before a marker
            place += 1
            continue
        if marker == app1 and image[place + 4 : place + 10] == EXIF_HEADER:
            return place + 10, place + 2 + size
        if marker == start_of_scan or marker < 0xFF00:
            return None
        place += 2 + size


def _in_png(image: Encoded) -> tuple[int, int] | None:
    place = len(PNG)
    while True:
        size, kind = struct.unpack_from(">I4s", image, place)
        if kind == b"eXIf":
            return place + 8, place + 8 + size
        if kind == b"IEND":  # some tools write the block behind the pixels
            return None
        place += 12 + size


def _in_webp(image: Encoded) -> tuple[int, int] | None:
    place = 12
    while True:
        kind, size = struct.unpack_from("<4sI", image, place)
        if kind == b"EXIF":
            start = place + 8
            header = image[start : start + 6] == EXIF_HEADER
            return start + (6 if header else 0), start + size
        place += 8 + size + size % 2
