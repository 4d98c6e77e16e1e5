import io
import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as v2
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from multitask.data.transforms import Crop, cut, decode, draw_crop, normalise, resize_images
from tests.multitask.data.images import encode, pixels
from tests.multitask.data.images import tensor as encoded
from tests.multitask.data.tables import png


def resized(images: list[torch.Tensor], resolution: int) -> torch.Tensor:
    """Shape (n, 3, resolution, resolution)."""
    return resize_images(images, [resolution], len(images))[resolution].permute(0, 3, 1, 2)


def smooth(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Shape (3, height, width), uint8."""
    small = Image.fromarray(pixels(4, 4, 3, seed=seed))
    return torch.from_numpy(np.array(small.resize((width, height), Image.Resampling.BICUBIC))).permute(2, 0, 1)


def test_a_colour_png_decodes_to_its_pixels() -> None:
    image = pixels(5, 7, 3)
    torch.testing.assert_close(decode(encoded(png(image))), torch.from_numpy(image).permute(2, 0, 1))


def test_a_grey_png_becomes_three_equal_channels() -> None:
    image = pixels(5, 7)
    torch.testing.assert_close(decode(encoded(png(image))), torch.from_numpy(image).expand(3, 5, 7))


def test_transparency_is_dropped() -> None:
    image = pixels(5, 7, 4)
    torch.testing.assert_close(decode(encoded(png(image))), torch.from_numpy(image[..., :3]).permute(2, 0, 1))


def test_a_16_bit_png_keeps_its_high_byte() -> None:
    image = pixels(5, 7).astype(np.uint16) * 256
    torch.testing.assert_close(decode(encoded(png(image))), torch.from_numpy(image // 256).byte().expand(3, 5, 7))


def test_a_jpeg_decodes_as_pillow_does() -> None:
    content = png(smooth(40, 30).permute(1, 2, 0).numpy(), "JPEG")
    reference = torch.from_numpy(np.array(Image.open(io.BytesIO(content)))).permute(2, 0, 1)
    torch.testing.assert_close(decode(encoded(content)), reference, atol=2, rtol=0)


WHOLE_PNG, WHOLE_JPEG = png(pixels(20, 20, 3)), png(pixels(20, 20, 3), "JPEG")


def two_frames(kind: str) -> bytes:
    frames = [Image.fromarray(pixels(4, 4, 3, seed=seed)) for seed in (0, 1)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        WHOLE_PNG[:-400],
        WHOLE_JPEG[: len(WHOLE_JPEG) // 2],
        WHOLE_PNG[:8],
        two_frames("GIF"),
        two_frames("WEBP"),
    ],
    ids=["empty", "text", "half a PNG", "half a JPEG", "a PNG signature", "an animated GIF", "an animated WebP"],
)
def test_what_is_no_whole_image_raises_one_kind_of_error(content: bytes) -> None:
    with pytest.raises(RuntimeError) as caught:
        decode(encoded(content))
    assert "/" not in str(caught.value), "the message should name no file of the machine that built torchvision"


def test_the_first_picture_of_an_animated_png_is_used() -> None:
    assert np.array_equal(decode(encoded(two_frames("PNG"))).permute(1, 2, 0), pixels(4, 4, 3, seed=0))


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
    sizes=st.lists(st.sampled_from([(28, 28), (28, 20), (7, 16), (16, 16), (1, 9), (1, 1)]), min_size=1, max_size=9),
    resolution=st.integers(2, 33),
)
def test_an_image_does_not_depend_on_its_neighbours_in_the_batch(sizes: list[tuple[int, int]], resolution: int) -> None:
    images = [torch.from_numpy(pixels(3, *size, seed=i)) for i, size in enumerate(sizes)]
    alone = torch.cat([resized([image], resolution) for image in images])
    assert torch.equal(resized(images, resolution), alone)


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_torchvisions_resized_crop(flip: bool) -> None:
    image = torch.from_numpy(pixels(3, 28, 20))
    reference = v2.functional.resized_crop(image, 3, 5, 11, 13, [16, 16], antialias=True)
    reference = v2.functional.horizontal_flip(reference) if flip else reference
    cropped = resized([cut(image, Crop(3, 5, 11, 13, flip)), cut(image, Crop(0, 0, 28, 20, False))], 16)
    # Mirroring before and after the resize may round differently by one step of 255.
    torch.testing.assert_close(cropped[0], reference, atol=int(flip), rtol=0)
    assert torch.equal(cropped[1], resized([image], 16)[0])


def test_crops_follow_the_distribution_of_torchvisions_random_resized_crop() -> None:
    def spread(crops: list[tuple[float, ...]]) -> np.ndarray:
        return np.quantile(np.array(crops), [0.1, 0.5, 0.9], axis=0)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = torch.zeros(3, 60, 100)
        reference = [v2.RandomResizedCrop.make_params(v2.RandomResizedCrop(8), [image]) for _ in range(3000)]
    ours = [draw_crop(60, 100, (0, 0, row)) for row in range(3000)]
    assert (
        np.abs(
            spread([crop[:4] for crop in ours])
            - spread([(p["top"], p["left"], p["height"], p["width"]) for p in reference])
        ).max()
        < 4
    )
    assert 0.45 < np.mean([crop.flip for crop in ours]) < 0.55


@given(height=st.integers(1, 300), width=st.integers(1, 300), row=st.integers(0, 1000))
def test_a_crop_lies_in_its_image_and_is_fixed_by_its_key(height: int, width: int, row: int) -> None:
    crop = draw_crop(height, width, (3, 1, row))
    assert crop == draw_crop(height, width, (3, 1, row))
    assert crop.height >= 1
    assert crop.width >= 1
    assert 0 <= crop.top <= height - crop.height
    assert 0 <= crop.left <= width - crop.width


def test_a_long_thin_image_gives_its_middle() -> None:
    crop = draw_crop(2, 300, (0, 0, 0))
    assert (crop.top, crop.left, crop.height, crop.width) == (0, 148, 2, 3)


def test_pixels_are_normalised_for_each_channel() -> None:
    images = torch.from_numpy(pixels(2, 3, 4, 4))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normal = normalise(images, mean, std)
    assert normal.dtype == torch.float32
    for channel in range(3):
        reference = (images[:, channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(normal[:, channel].double(), reference, atol=1e-6, rtol=1e-6)
    assert math.isclose(normalise(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8), (0,) * 3, (1,) * 3).max(), 1.0)
