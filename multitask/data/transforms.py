"""Random change of training images. `patches.images` decodes, resizes and normalises them.

Axes: h and w are pixels. No function here uses or changes a global random state.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

CROP_AREA = (0.08, 1.0)
"""Smallest and largest share of the image's area that a crop covers."""
CROP_ASPECT = (3 / 4, 4 / 3)
"""Smallest and largest ratio of a crop's width to its height."""
CROP_TRIES = 10
"""Number of random crops that are tried before the largest crop in the middle is taken."""


class Crop(NamedTuple):
    """A rectangle of an image, in pixels, and whether it is mirrored from left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


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
