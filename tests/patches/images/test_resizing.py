import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as v2
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from patches.images.preprocessing import SQUASH, Framing, Preprocessing
from patches.images.resizing import MOST_SIDES, network_input, normalise, resize_images
from tests.multitask.data.images import pixels, smooth

FRAMINGS = (SQUASH, Framing("center_crop"), Framing("pad", (9, 120, 255)))
SHAPES = ((28, 28), (28, 20), (7, 16), (16, 16), (1, 9), (1, 1), (70, 40), (33, 71))


def resized(images: list[torch.Tensor], resolution: int, framing: Framing = SQUASH) -> torch.Tensor:
    """Shape (n, 3, resolution, resolution)."""
    return resize_images(images, [resolution], len(images), framing)[resolution].permute(0, 3, 1, 2)


def test_an_image_fills_the_square_whatever_its_aspect() -> None:
    image = torch.zeros(3, 8, 32, dtype=torch.uint8)
    image[:, :, 16:] = 255
    square = resized([image], 8)[0]
    assert (square[:, :, :3] == 0).all()
    assert (square[:, :, 5:] == 255).all()


@pytest.mark.parametrize(("height", "width", "resolution"), [(28, 28, 16), (28, 28, 40), (31, 17, 12), (9, 50, 24)])
def test_resize_is_pillows_bilinear(height: int, width: int, resolution: int) -> None:
    image = smooth(height, width)
    reference = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((resolution,) * 2, Image.Resampling.BILINEAR)
    result = resized([image], resolution)
    assert result.shape == (1, 3, resolution, resolution)
    torch.testing.assert_close(result[0], torch.from_numpy(np.array(reference)).permute(2, 0, 1), atol=1, rtol=0)


def test_an_image_of_the_right_size_is_unchanged() -> None:
    image = torch.from_numpy(pixels(3, 16, 16))
    assert torch.equal(resized([image], 16)[0], image)


@settings(max_examples=30)
@given(
    sizes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=9),
    resolution=st.integers(2, 33),
    framing=st.sampled_from(FRAMINGS),
)
def test_an_image_does_not_depend_on_its_neighbours_in_the_batch(
    sizes: list[tuple[int, int]], resolution: int, framing: Framing
) -> None:
    images = [torch.from_numpy(pixels(3, *size, seed=i)) for i, size in enumerate(sizes)]
    alone = torch.cat([resized([image], resolution, framing) for image in images])
    assert torch.equal(resized(images, resolution, framing), alone)


@given(shape=st.tuples(st.integers(1, 80), st.integers(1, 80)), resolution=st.integers(2, 40))
def test_center_crop_is_torchvisions_resize_of_the_shorter_side_and_crop(
    shape: tuple[int, int], resolution: int
) -> None:
    assume(max(shape) <= MOST_SIDES * min(shape))
    image = torch.from_numpy(pixels(3, *shape))
    reference = v2.Compose([v2.Resize(resolution, antialias=True), v2.CenterCrop(resolution)])(image)
    assert torch.equal(resized([image], resolution, Framing("center_crop"))[0], reference)


@pytest.mark.parametrize("shape", [(40, 30_001), (30_001, 40)])
def test_of_a_long_thin_image_center_crop_resizes_only_the_middle(shape: tuple[int, int]) -> None:
    """Resized whole, it would have 768 times the pixels of the square."""
    image = torch.from_numpy(pixels(3, *shape))
    top, left = (round((side - 160) / 2) if side > 160 else 0 for side in shape)
    middle = image[:, top : top + 160, left : left + 160]
    assert sorted(middle.shape[1:]) == [40, MOST_SIDES * 40]
    assert torch.equal(resized([image], 16, FRAMINGS[1]), resized([middle], 16, FRAMINGS[1]))


@given(shape=st.tuples(st.integers(1, 80), st.integers(1, 80)), resolution=st.integers(2, 40))
def test_pad_resizes_the_longer_side_and_puts_the_image_in_the_middle(shape: tuple[int, int], resolution: int) -> None:
    image = torch.from_numpy(pixels(3, *shape))
    height, width = (max(2, resolution * side // max(shape)) for side in shape)
    inner = v2.functional.resize(image, [height, width], antialias=True)
    expected = torch.tensor([9, 120, 255], dtype=torch.uint8)[:, None, None].repeat(1, resolution, resolution)
    top, left = (resolution - height) // 2, (resolution - width) // 2
    expected[:, top : top + height, left : left + width] = inner
    assert max(height, width) == resolution
    assert torch.equal(resized([image], resolution, FRAMINGS[2])[0], expected)


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_square_image_has_the_same_pixels_however_it_is_framed(framing: Framing) -> None:
    image = torch.from_numpy(pixels(3, 30, 30))
    assert torch.equal(resized([image], 12, framing), resized([image], 12))


def test_a_padded_border_is_about_zero_for_the_network() -> None:
    preprocessing = Preprocessing(8, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "pad")
    white = torch.full((3, 8, 2), 255, dtype=torch.uint8)
    inputs = network_input(resize_images([white], [8], 1, preprocessing.framing)[8], preprocessing, "cpu")
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    # The border is a whole pixel value, so it differs from the mean by at most half of one.
    assert inputs[..., :3].abs().max() <= 0.5 / 255 / 0.224 + 1e-6
    assert inputs[..., 3:5].min() > 2


def test_pixels_are_normalised_for_each_channel() -> None:
    images = torch.from_numpy(pixels(2, 3, 4, 4))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normal = normalise(images, mean, std)
    assert normal.dtype == torch.float32
    for channel in range(3):
        reference = (images[:, channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(normal[:, channel].double(), reference, atol=1e-6, rtol=1e-6)
    assert math.isclose(normalise(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8), (0,) * 3, (1,) * 3).max(), 1.0)
