"""Resizing and normalising: from pixels of any shape to the float tensors that a network reads.

Axes: n is the image of a batch, c the channel (red, green, blue), h and w are pixels.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as F

from patches.images.preprocessing import SQUASH, Framing, Preprocessing

STACKED_VALUES = 3 * 64 * 64
"""Largest number of values of an image that is resized together with others. Larger images are resized one by one,
because copying them into one tensor takes longer than a separate call."""
MOST_SIDES = 4
"""An image that is longer than this many times its shorter side is cut in the middle to that length before
`center_crop` resizes it. Otherwise a line of pixels would be resized to gigabytes, most of which is cut off."""
LEAST_SIDE = 2
"""Smallest side to which an image is resized, in pixels. torch 2.15 cannot resize uint8 images to a single pixel."""


def resize_images(
    images: Iterable[Tensor], resolutions: Sequence[int], most: int, framing: Framing = SQUASH
) -> dict[int, Tensor]:
    """Resize images of any size to one or several square sizes, bilinearly with antialiasing.

    A large image is resized as soon as it is decoded, while its pixels are in the processor's cache. Small images of
    equal size are resized in one call, which is several times faster and changes no value.

    With `squash`, height and width are resized to the resolution, whatever their ratio. With `center_crop`, the shorter
    side is, in the same ratio as the longer one, and the square in the middle is kept. With `pad`, the longer side is,
    and the border fills what is missing on both sides of the shorter one.

    Args:
        images: each of shape (3, h, w), uint8.
        resolutions: heights and widths of the results, in pixels, at least 2.
        most: upper limit of the number of images.
        framing: how an image that is no square becomes one.
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
                resized_nhwc[place] = _square(image_hwc[None], size, framing)[0]
        else:
            together.setdefault(image_hwc.shape, []).append((place, image_hwc))
        count = place + 1
    for group in together.values():
        places, stack_nhwc = [place for place, _ in group], torch.stack([image_hwc for _, image_hwc in group])
        for size, resized_nhwc in resized.items():
            resized_nhwc[places] = _square(stack_nhwc, size, framing)
    return {size: resized_nhwc[:count] for size, resized_nhwc in resized.items()}


def network_input(squares_nhwc: Tensor, preprocessing: Preprocessing, device: torch.device | str) -> Tensor:
    """Return resized images as a network reads them: normalised floats, channels last in memory.

    Args:
        squares_nhwc: shape (n, resolution, resolution, 3), uint8.
    Returns:
        Shape (n, 3, resolution, resolution), float32, on the device.
    """
    images_nchw = squares_nhwc.permute(0, 3, 1, 2).to(device)
    normal_nchw = normalise(images_nchw, preprocessing.mean, preprocessing.std)
    return normal_nchw.contiguous(memory_format=torch.channels_last)


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


def _square(images_nhwc: Tensor, resolution: int, framing: Framing) -> Tensor:
    """Resize images of shape (n, h, w, 3), uint8, to shape (n, resolution, resolution, 3)."""
    if framing.resize == "squash":
        return _resize(images_nhwc, resolution, resolution)
    if framing.resize == "center_crop":
        short = min(images_nhwc.shape[1:3])
        images_nhwc = _middle(images_nhwc, MOST_SIDES * short)
        height, width = (resolution * side // short for side in images_nhwc.shape[1:3])
        return _middle(_resize(images_nhwc, height, width), resolution)
    long = max(images_nhwc.shape[1:3])
    height, width = (max(LEAST_SIDE, resolution * side // long) for side in images_nhwc.shape[1:3])
    top, left = (resolution - height) // 2, (resolution - width) // 2
    padded_nhwc = torch.tensor(framing.border, dtype=torch.uint8).repeat(len(images_nhwc), resolution, resolution, 1)
    padded_nhwc[:, top : top + height, left : left + width] = _resize(images_nhwc, height, width)
    return padded_nhwc


def _middle(images_nhwc: Tensor, most: int) -> Tensor:
    """Cut images in the middle, so that height and width are at most `most` pixels. torchvision's CenterCrop rounds
    the same way."""
    height, width = images_nhwc.shape[1:3]
    top, left = round(max(0, height - most) / 2), round(max(0, width - most) / 2)
    return images_nhwc[:, top : top + most, left : left + most]


def _resize(images_nhwc: Tensor, height: int, width: int) -> Tensor:
    """Resize images of shape (n, h, w, 3), uint8, to shape (n, height, width, 3)."""
    # torchvision's resize makes the same call, but takes extra time around it. The kernel works on (n, h, w, c), the
    # order that the decoder writes. Given (n, c, h, w), it would reorder first, which takes as long as the resize.
    images_nchw = images_nhwc.permute(0, 3, 1, 2)
    resized_nchw = interpolate(images_nchw, [height, width], mode="bilinear", antialias=True)
    return resized_nchw.permute(0, 2, 3, 1)
