"""Reading the images that are to be answered: on threads, in order, from files, bytes, Pillow or tensors."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor

from patches.errors import ImageError
from patches.images.decoding import decode
from patches.images.formats import png_image, readable
from patches.images.orientation import AS_STORED, TAG, upright
from patches.images.png import rgb_pixels
from patches.images.preprocessing import Preprocessing
from patches.images.resizing import resize_images
from patches.quoting import quoted, shortened

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | Tensor
"""The path of an image file, the bytes of one, an image of Pillow, or pixels of shape (3, h, w), uint8."""
Numbered: TypeAlias = tuple[int, ImageLike]
PART = 8
"""Number of images that a thread loads at a time. Small images of equal size are resized together."""
PARTS_AHEAD = 16
"""Number of parts that are loaded ahead of the one that is used."""
PILLOW = threading.Lock()
"""Pillow loads the pixels of an image when they are first needed, and two threads at once would mix them up."""


def read_squares(images: Iterable[ImageLike], preprocessing: Preprocessing) -> Iterator[Tensor | ImageError]:
    """Yield each image as a square of shape (resolution, resolution, 3), uint8, or the error if it cannot be decoded.

    Images are loaded on as many threads as torch computes with, ahead of those that are used.
    """
    size = preprocessing.resolution

    def load(part: Sequence[Numbered]) -> list[Tensor | ImageError]:
        errors: dict[int, ImageError] = {}

        def whole() -> Iterator[Tensor]:
            for place, (number, image) in enumerate(part):
                pixels = _pixels_or_error(number, image)
                if isinstance(pixels, ImageError):
                    errors[place] = pixels
                else:
                    yield pixels

        squares = iter(resize_images(whole(), [size], len(part), preprocessing.framing)[size])
        return [errors[place] if place in errors else next(squares) for place in range(len(part))]

    return _on_threads(load, images, PART, PARTS_AHEAD)


def read_whole(images: Iterable[ImageLike]) -> Iterator[Tensor | ImageError]:
    """Yield the pixels of each image, shape (3, h, w), uint8, or the error if it cannot be decoded.

    Images are loaded as by `read_squares`, but fewer ahead, because large photos take tens of megabytes each.
    """
    return _on_threads(lambda part: [_pixels_or_error(*numbered) for numbered in part], images, 1, PARTS_AHEAD)


def read_pixels(image: ImageLike) -> Tensor:
    """Return the pixels of an image, upright, as training reads them.

    A file is decoded by `decode`, after a BMP, PPM, PGM or TIFF has become a PNG, as at an import. An image that Pillow
    has opened has the pixels that Pillow decodes, which may differ by a few steps of 255 from those of `decode` for a
    JPEG; its EXIF orientation is applied. Pixels are taken as they are.

    Returns:
        Shape (3, h, w), uint8.
    Raises:
        ImageError: the image cannot be read or decoded, or has another type or shape. The message does not name it.
    """
    try:
        match image:
            case bytes():
                return _decoded(image)
            case str() | os.PathLike():
                return _decoded(Path(image).read_bytes())
            case Image.Image():
                return _of_pillow(image)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
        raise ImageError(shortened(reason)) from error
    if not isinstance(image, Tensor):
        raise ImageError(f"it is a {type(image).__name__}, expected a path, bytes, an image of Pillow or a tensor")
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        shape = f"{quoted(list(image.shape))} and type {image.dtype}"
        raise ImageError(f"it has shape {shape}, expected [3, height, width] and torch.uint8: pixels from 0 to 255")
    return image.cpu()


def _decoded(content: bytes) -> Tensor:
    """Decode the bytes of an image file.

    Raises:
        RuntimeError: it cannot be decoded.
    """
    if not content:
        raise RuntimeError("it is empty")
    return decode(torch.frombuffer(bytearray(readable(content)), dtype=torch.uint8))


def _of_pillow(image: Image.Image) -> Tensor:
    """Return the pixels of an image that Pillow has opened.

    Raises:
        RuntimeError: it cannot be decoded, or its pixels are of unknown range.
    """
    try:
        with PILLOW:
            image.load()
        orientation = image.getexif().get(TAG, AS_STORED)
        pixels_chw = torch.from_numpy(rgb_pixels(png_image(image))).permute(2, 0, 1)
    except Exception as error:  # Pillow raises errors of many kinds for damaged files
        raise RuntimeError(str(error)) from error
    return upright(pixels_chw, orientation if orientation in range(1, 9) else AS_STORED)


def _pixels_or_error(number: int, image: ImageLike) -> Tensor | ImageError:
    """Return the pixels of an image, or an error that names it: by its path or, if it has none, by its number."""
    try:
        return read_pixels(image)
    except ImageError as error:
        name = os.fspath(image) if isinstance(image, str | os.PathLike) else f"Image {number} (counted from 0)"
        return ImageError(f"{shortened(name, 1000)}: {error}")


def _on_threads(
    load: Callable[[Sequence[Numbered]], list[Tensor | ImageError]],
    images: Iterable[ImageLike],
    part: int,
    ahead: int,
) -> Iterator[Tensor | ImageError]:
    """Yield what `load` returns for parts of the images, in their order, and load further parts meanwhile."""
    numbered = enumerate(images)
    waiting: deque[Future[list[Tensor | ImageError]]] = deque()
    threads = ThreadPoolExecutor(torch.get_num_threads(), "images")
    try:
        while images_of_part := list(islice(numbered, part)):
            waiting.append(threads.submit(load, images_of_part))
            if len(waiting) > ahead:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
