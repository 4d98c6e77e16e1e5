"""Random changes of training images, each a function of (seed, epoch, row).

torchvision's classes of these transforms draw from torch's random generator, of which a process has one. Images are
decoded in the background, so these draws would come in between those of the steps' dropout, at moments that chance
decides. Here the draws are made from keys, and the images are changed by torchvision's functions.

Axes: n is the image of a batch, c the channel (red, green, blue), h and w are pixels.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from multitask.data.transforms import Crop, cut, draw_crop

Augment = Literal["none", "crop_flip", "resize_crop", "flip", "color_jitter", "rand_augment"]
"""A random change of training images; `crop_flip` is `resize_crop` and `flip` together."""
CROP, JITTER, RAND_AUGMENT = 1, 2, 3
"""First number of the random key of a change. It keeps these draws apart from other draws with the same seed."""
JITTER_FACTORS = (0.6, 1.4)
"""Smallest and largest factor on brightness, contrast and saturation: strength 0.4, as timm has it."""
OPERATIONS = 2
"""Number of operations of RandAugment on one image, torchvision's default."""
MAGNITUDE = 9 / 30
"""Strength of these operations, as a share of the strongest: magnitude 9 of 0 to 30, torchvision's default."""


class Augmentation:
    """Changes the training images of one stream at random."""

    def __init__(self, changes: Collection[Augment], seed: int) -> None:
        """Args:
        changes: what may change, in any order: an image is cropped, mirrored, resized, jittered, and then changed by
            RandAugment.
        seed: 0 or more.
        """
        self._crops = not {"crop_flip", "resize_crop"}.isdisjoint(changes)
        self._flips = not {"crop_flip", "flip"}.isdisjoint(changes)
        self._jitters, self._rand_augments = "color_jitter" in changes, "rand_augment" in changes
        self._seed = seed

    def cut(self, image_chw: Tensor, key: Sequence[int]) -> Tensor:
        """Return the part of a decoded image that is kept, mirrored or as it is.

        Args:
            image_chw: shape (3, h, w), uint8.
            key: numbers that determine the draw together with the seed, such as (epoch, row).
        """
        if not (self._crops or self._flips):
            return image_chw
        height, width = image_chw.shape[1:]
        crop = draw_crop(height, width, (CROP, self._seed, *key))
        if not self._crops:
            crop = Crop(0, 0, height, width, crop.flip)
        return cut(image_chw, crop if self._flips else crop._replace(flip=False))

    def change(self, images_nhwc: Tensor, keys: Sequence[Sequence[int]]) -> None:
        """Change resized images in place. An image changes in the same way at every resolution.

        Args:
            images_nhwc: shape (n, h, w, 3), uint8.
            keys: as for `cut`, one for each image.
        """
        if not (self._jitters or self._rand_augments):
            return
        for image_hwc, key in zip(images_nhwc, keys, strict=True):
            image_chw = image_hwc.permute(2, 0, 1)
            if self._jitters:
                image_chw = jitter_colors(image_chw, (JITTER, self._seed, *key))
            if self._rand_augments:
                image_chw = rand_augment(image_chw, (RAND_AUGMENT, self._seed, *key))
            image_hwc.copy_(image_chw.permute(1, 2, 0))


def jitter_colors(image_chw: Tensor, key: Sequence[int]) -> Tensor:
    """Change brightness, contrast and saturation, in an order and by factors that are drawn uniformly.

    The distribution is that of torchvision's `ColorJitter(0.4, 0.4, 0.4)`.

    Args:
        image_chw: shape (3, h, w), uint8.
        key: numbers that determine the draw, each at least 0.
    """
    random = np.random.default_rng(list(key))
    changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    factors = random.uniform(*JITTER_FACTORS, len(changes)).tolist()
    for number in random.permutation(len(changes)).tolist():
        image_chw = changes[number](image_chw, factors[number])
    return image_chw


def rand_augment(image_chw: Tensor, key: Sequence[int]) -> Tensor:
    """Apply two operations that are drawn from `RAND_AUGMENT_OPERATIONS`, each with a sign.

    Operations and distribution are those of torchvision's `RandAugment()`. What comes into the image from outside is
    black.

    Args:
        image_chw: shape (3, h, w), uint8.
        key: numbers that determine the draw, each at least 0.
    Source: Cubuk et al., "RandAugment", NeurIPS 2020, arXiv:1909.13719.
    """
    random = np.random.default_rng(list(key))
    for _ in range(OPERATIONS):
        name = list(RAND_AUGMENT_OPERATIONS)[random.integers(len(RAND_AUGMENT_OPERATIONS))]
        sign = int(random.choice((-1, 1)))
        image_chw = RAND_AUGMENT_OPERATIONS[name](image_chw, sign * MAGNITUDE)
    return image_chw


def _shear(image_chw: Tensor, x: float = 0.0, y: float = 0.0) -> Tensor:
    """Shear an image about its upper left corner; x and y are tangents."""
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return F.affine(image_chw, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0])


def _translate(image_chw: Tensor, x: float = 0.0, y: float = 0.0) -> Tensor:
    """Move an image by whole pixels; x and y are shares of its width and height."""
    height, width = image_chw.shape[1:]
    return F.affine(image_chw, angle=0.0, translate=[int(x * width), int(y * height)], scale=1.0, shear=[0.0, 0.0])


RAND_AUGMENT_OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "Identity": lambda image, _: image,
    "ShearX": lambda image, signed: _shear(image, x=0.3 * signed),
    "ShearY": lambda image, signed: _shear(image, y=0.3 * signed),
    "TranslateX": lambda image, signed: _translate(image, x=150 / 331 * signed),
    "TranslateY": lambda image, signed: _translate(image, y=150 / 331 * signed),
    "Rotate": lambda image, signed: F.rotate(image, 30 * signed),
    "Brightness": lambda image, signed: F.adjust_brightness(image, 1 + 0.9 * signed),
    "Color": lambda image, signed: F.adjust_saturation(image, 1 + 0.9 * signed),
    "Contrast": lambda image, signed: F.adjust_contrast(image, 1 + 0.9 * signed),
    "Sharpness": lambda image, signed: F.adjust_sharpness(image, 1 + 0.9 * signed),
    "Posterize": lambda image, signed: F.posterize(image, round(8 - 4 * abs(signed))),
    "Solarize": lambda image, signed: F.solarize(image, 255 * (1 - abs(signed))),
    "AutoContrast": lambda image, _: F.autocontrast(image),
    "Equalize": lambda image, _: F.equalize(image),
}
"""Operations of RandAugment by torchvision's names: from an image of shape (3, h, w), uint8, and the magnitude as a
share of the strongest, with a sign, to the changed image."""
