"""From encoded images to the float tensors a model reads.

Axes: n image of a batch, c channel (red, green, blue), h and w pixels. Nothing here touches a global random state.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

Augment = Literal["none", "crop_flip"]
CROP_AREA = (0.08, 1.0)
"""Share of the image's area that a crop covers before it is resized."""
CROP_ASPECT = (3 / 4, 4 / 3)
"""Width over height of a crop."""
CROP_TRIES = 10
STACKED_VALUES = 3 * 64 * 64
"""Larger images are resized one by one: copying them side by side costs more than a call."""


class Crop(NamedTuple):
    """A part of an image, in pixels, and whether it is mirrored left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def decode(encoded: Tensor) -> Tensor:
    """Pixels of one PNG or JPEG; a grey image gets three equal channels, transparency is dropped.

    Args:
        encoded: shape (bytes,), uint8.
    Returns:
        Shape (3, h, w), uint8.
    Raises:
        RuntimeError: the bytes are no whole image of a known format.
    """
    # torchvision 0.29 calls its decoders deprecated in favour of torchcodec; this is the only place that calls one.
    image_chw = decode_image(encoded, mode=ImageReadMode.RGB)
    if image_chw.ndim != 3:
        raise RuntimeError(f"Found an animation of {len(image_chw)} images, expected a single one.")
    return F.to_dtype(image_chw, torch.uint8, scale=True)


def draw_crop(height: int, width: int, key: Sequence[int]) -> Crop:
    """A random crop of an image and, for every other one, a flip: the draw of torchvision's RandomResizedCrop.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        key: numbers that fix the draw, such as (seed, epoch, row); each at least 0.
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
    # No crop fits in a long, thin image: take the largest one in its middle.
    crop_width = max(1, min(width, round(height * CROP_ASPECT[1])))
    crop_height = max(1, min(height, round(width / CROP_ASPECT[0])))
    return Crop((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width, flip)


def cut(image_chw: Tensor, crop: Crop) -> Tensor:
    """The part of an image, shape (3, h, w), that a crop keeps: shape (3, crop.height, crop.width)."""
    part_chw = image_chw[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    return part_chw.flip(-1) if crop.flip else part_chw


def resize_images(images: Iterable[Tensor], resolutions: Sequence[int], most: int) -> dict[int, Tensor]:
    """Bring images of any sizes to one or several square sizes, bilinear with antialiasing.

    Each image is resized as it comes, while its pixels are in the processor's cache. Small images of one size are
    resized in one call, which is several times faster and changes no value.

    Args:
        images: at most `most`, each of shape (3, h, w), uint8.
        resolutions: heights and widths of the results, in pixels, at least 2.
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
    """Shape (n, resolution, resolution, 3), uint8."""
    # What torchvision's resize calls, without the time its own code takes. The kernel works on (n, h, w, c), as the
    # decoder writes it; from (n, c, h, w) it first makes that order, which takes as long as the resize.
    images_nchw = images_nhwc.permute(0, 3, 1, 2)
    resized_nchw = interpolate(images_nchw, [resolution, resolution], mode="bilinear", antialias=True)
    return resized_nchw.permute(0, 2, 3, 1)


def normalise(images_nchw: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels 0 to 255 as (pixel / 255 - mean) / std.

    Args:
        images_nchw: shape (n, 3, h, w), uint8.
        mean: for each of the three channels, on the scale 0 to 1.
        std: for each of the three channels, on the scale 0 to 1.
    Returns:
        Shape (n, 3, h, w), float32.
    """
    return F.normalize(F.to_dtype(images_nchw, torch.float32, scale=True), list(mean), list(std), inplace=True)
