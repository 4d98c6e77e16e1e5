"""Mixing of the images of a batch with each other."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torchvision.transforms import v2

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From images (B, 3, R, R), float, and labels (B,), int64, to mixed images of the same shape, and the share of each
class in each of them, (B, C)."""
MIXUP_ALPHA, CUTMIX_ALPHA = 0.2, 1.0
"""Parameters of the Beta distribution with which the papers train on ImageNet."""


def make_mix(kind: Literal["none", "mixup", "cutmix"], alpha: float | None, classes: int) -> Mix | None:
    """Return what mixes a batch; None leaves it as it is.

    For each batch a share is drawn from Beta(alpha, alpha). `mixup` adds each image, times the share, and the image
    before it in the batch, times the rest. `cutmix` replaces a box of each image by that of the image before it; the
    share is what remains of the image's area. In both, the label becomes the mean of the two images' labels with these
    weights. The random numbers are those of torch's generator.

    Args:
        alpha: above 0; None for the paper's own.
        classes: number of classes C.
    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, arXiv:1710.09412; Yun et al.,
        "CutMix", ICCV 2019, arXiv:1905.04899. The papers draw the partners of a batch at random; torchvision, which
        does the work here, takes neighbours, whose order is random already.
    """
    if kind == "none":
        return None
    if kind == "mixup":
        return v2.MixUp(alpha=alpha or MIXUP_ALPHA, num_classes=classes)
    return v2.CutMix(alpha=alpha or CUTMIX_ALPHA, num_classes=classes)
