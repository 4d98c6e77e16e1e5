import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as v2
from hypothesis import given
from hypothesis import strategies as st

from multitask.data.transforms import Crop, cut, draw_crop
from patches.images.resizing import resize_images
from tests.multitask.data.images import pixels


def resized(images: list[torch.Tensor], resolution: int) -> torch.Tensor:
    """Shape (n, 3, resolution, resolution)."""
    return resize_images(images, [resolution], len(images))[resolution].permute(0, 3, 1, 2)


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
