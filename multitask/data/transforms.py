"""Decoding, cropping, resizing and normalising: from encoded images to the float tensors that a model reads.

Axes: n is the image of a batch, c the channel (red, green, blue), h and w are pixels. No function here uses or changes
a global random state.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

from multitask.data.orientation import read_orientation, upright
from multitask.data.png import SIGNATURE, decode_png

SOURCE_LINE = re.compile(r"^.*\.cpp:\d+, ")
"""Matches how torchvision's errors begin: the function, and the line of its source on the machine that built it."""
CROP_AREA = (0.08, 1.0)
"""Smallest and largest share of the image's area that a crop covers."""
CROP_ASPECT = (3 / 4, 4 / 3)
"""Smallest and largest ratio of a crop's width to its height."""
CROP_TRIES = 10
"""Number of random crops that are tried before the largest crop in the middle is taken."""
STACKED_VALUES = 3 * 64 * 64
"""Largest number of values of an image that is resized together with others. Larger images are resized one by one,
because copying them into one tensor takes longer than a separate call."""


class Crop(NamedTuple):
    """A rectangle of an image, in pixels, and whether it is mirrored from left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


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


def draw_crop(height: int, width: int, key: Sequence[int]) -> Crop:
    """Draw a random crop, which is flipped with probability 1/2.

    The distribution is that of torchvision's `RandomResizedCrop`.

    Args:
        height: height of the image, in pixels.
        width: width of the image, in pixels.
        key: numbers that determine the draw, such as (seed, epoch, row), each at least 0.
    """
    random = np.random.default_rng(list(key))
    flip = bool(random.random() < 0.5)
    for _ in range(CROP_TRIES):
        area = height * width * random.uniform(*CROP_AREA)
        aspect = math.exp(random.uniform(math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(random.integers(height - crop_height + 1))
            left = int(random.integers(width - crop_width + 1))
            return Crop(top, left, crop_height, crop_width, flip)
    # No random crop fitted, as in a long, thin image: take the largest crop in the middle.
    crop_width = max(1, min(width, round(height * CROP_ASPECT[1])))
    crop_height = max(1, min(height, round(width / CROP_ASPECT[0])))
    return Crop((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width, flip)


def cut(image_chw: Tensor, crop: Crop) -> Tensor:
    """Apply a crop to an image of shape (3, h, w). The result has shape (3, crop.height, crop.width)."""
    part_chw = image_chw[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    return part_chw.flip(-1) if crop.flip else part_chw


def resize_images(images: Iterable[Tensor], resolutions: Sequence[int], most: int) -> dict[int, Tensor]:
    """Resize images of any size to one or several square sizes, bilinearly with antialiasing.

    A large image is resized as soon as it is decoded, while its pixels are in the processor's cache. Small images of
    equal size are resized in one call, which is several times faster and changes no value.

    Args:
        images: each of shape (3, h, w), uint8.
        resolutions: heights and widths of the results, in pixels, at least 2.
        most: upper limit of the number of images.
    Returns:
        Resolution -> shape (n, resolution, resolution, 3), uint8.
    """
    resized = {size: torch.empty(most, size, size, 3, dtype=torch.uint8) for size in resolutions}
    together: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    count = 0
    for place, image_chw in enumerate(images):
        image_hwc = image_chw.permute(1, 2, 0).contiguous()
        if image_hwc.numel() > STACKED_VALUES:
            for size, resized_nhwc in resized.items():
                resized_nhwc[place] = _resize(image_hwc[None], size)[0]
        else:
            together.setdefault(image_hwc.shape, []).append((place, image_hwc))
        count = place + 1
    for group in together.values():
        places, stack_nhwc = [place for place, _ in group], torch.stack([image_hwc for _, image_hwc in group])
        for size, resized_nhwc in resized.items():
            resized_nhwc[places] = _resize(stack_nhwc, size)
    return {size: resized_nhwc[:count] for size, resized_nhwc in resized.items()}


def _resize(images_nhwc: Tensor, resolution: int) -> Tensor:
    """Resize images of shape (n, h, w, 3), uint8, to shape (n, resolution, resolution, 3)."""
    # torchvision's resize makes the same call, but takes extra time around it. The kernel works on (n, h, w, c), the
    # order that the decoder writes. Given (n, c, h, w), it would reorder first, which takes as long as the resize.
    images_nchw = images_nhwc.permute(0, 3, 1, 2)
    resized_nchw = interpolate(images_nchw, [resolution, resolution], mode="bilinear", antialias=True)
    return resized_nchw.permute(0, 2, 3, 1)


def normalise(images_nchw: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Compute (pixel / 255 - mean) / std.

    Args:
        images_nchw: shape (n, 3, h, w), uint8.
        mean: one number for each channel, on the scale 0 to 1.
        std: one number for each channel, on the scale 0 to 1.
    Returns:
        Shape (n, 3, h, w), float32.
    """
    return F.normalize(F.to_dtype(images_nchw, torch.float32, scale=True), list(mean), list(std), inplace=True)
