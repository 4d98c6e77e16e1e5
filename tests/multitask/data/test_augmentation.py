from collections import Counter
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from multitask.data import augmentation
from multitask.data.augmentation import Augment, Augmentation, jitter_colors, rand_augment
from multitask.data.transforms import Crop, cut, draw_crop
from multitask.spec import fields
from tests.multitask.data.images import pixels

KEY = (4, 7)
"""Epoch and row."""


def image_of(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(pixels(3, height, width, seed=seed))


def test_a_spec_has_the_names_of_the_data() -> None:
    assert set(get_args(Augment)) == {"none", *get_args(fields.Augmentation)}


def test_crop_flip_is_a_resized_crop_and_a_flip_with_the_draws_of_version_0_1() -> None:
    flipped = 0
    for row in range(20):
        image, seed = image_of(20, 30, seed=row), 5
        drawn = draw_crop(20, 30, (1, seed, 4, row))
        flipped += drawn.flip

        def made(*changes: Augment, image: Tensor = image, row: int = row) -> Tensor:
            return Augmentation(changes, seed=5).cut(image, (4, row))

        assert torch.equal(made("crop_flip"), cut(image, drawn))
        assert torch.equal(made("resize_crop", "flip"), cut(image, drawn))
        assert torch.equal(made("resize_crop"), cut(image, Crop(*drawn[:4], flip=False)))
        assert torch.equal(made("flip"), image.flip(-1) if drawn.flip else image)
        assert torch.equal(made("none"), image)
        assert torch.equal(made("color_jitter"), image)
    assert 0 < flipped < 20


@pytest.mark.parametrize("change", ["color_jitter", "rand_augment"])
def test_an_image_changes_by_its_key_alone_and_the_global_random_state_stays(change: Augment) -> None:
    images_nhwc = torch.stack([image_of(16, 16, seed=row).permute(1, 2, 0) for row in range(6)])
    keys = [(4, row) for row in range(6)]
    state = torch.get_rng_state()
    together, alone = images_nhwc.clone(), images_nhwc.flip(0).clone()

    Augmentation([change], seed=0).change(together, keys)
    torch.rand(3)
    for image, key in zip(alone, keys[::-1], strict=True):
        Augmentation([change], seed=0).change(image[None], [key])

    assert torch.equal(alone.flip(0), together)
    assert not torch.equal(together, images_nhwc)
    other = images_nhwc.clone()
    Augmentation([change], seed=1).change(other, keys)
    assert not torch.equal(other, together)
    torch.set_rng_state(state)
    Augmentation([change], seed=0).change(images_nhwc, keys)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images_nhwc, together)


def test_color_jitter_has_the_formulas_and_factors_of_its_draw() -> None:
    """In float64. torchvision cuts each of three results to whole numbers, and later factors enlarge what is cut."""
    for row in range(8):
        image, key = image_of(9, 7, seed=row), (2, 0, 4, row)
        random = np.random.default_rng(list(key))
        brightness, contrast, saturation = random.uniform(0.6, 1.4, 3)
        expected = image.double()
        for number in random.permutation(3):
            grey = (expected * torch.tensor([0.2989, 0.587, 0.114]).double()[:, None, None]).sum(0)
            other, factor = [(0.0, brightness), (grey.floor().mean(), contrast), (grey, saturation)][number]
            expected = (factor * expected + (1 - factor) * other).clamp(0, 255)
        assert (jitter_colors(image, key).double() - expected).abs().max() < 5


def test_color_jitter_changes_brightness_by_0_6_to_1_4() -> None:
    grey = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    found = [jitter_colors(grey, (row,))[0, 0, 0].item() for row in range(500)]
    # Contrast and saturation leave a grey image of one colour as it is, but for cutting it to whole numbers.
    assert 57 < min(found) < 64
    assert 135 < max(found) <= 140
    assert np.mean(found) == pytest.approx(100, abs=3)


@pytest.mark.parametrize("size", [(24, 24), (17, 40), (32, 8)])
@pytest.mark.parametrize("sign", [1, -1])
def test_operations_of_rand_augment_are_torchvisions(
    size: tuple[int, int], sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision is given each number of an operation, and the sign, in place of its draws."""
    image, operations = image_of(*size) // 2 + 80, augmentation.RAND_AUGMENT_OPERATIONS
    theirs, drawn = v2.RandAugment(num_ops=1), iter(range(len(operations)))

    def draw_operation(count: int, _: tuple[()]) -> Tensor:
        assert count == len(operations)
        return torch.tensor(next(drawn))

    monkeypatch.setattr(torch, "randint", draw_operation)
    monkeypatch.setattr(torch, "rand", lambda _: torch.tensor(0.25 if sign == -1 else 0.75))
    for name, operation in operations.items():
        found, expected = operation(image, sign * augmentation.MAGNITUDE), theirs(image)
        # A factor in float64 may cut one pixel in many to the whole number beside torchvision's.
        assert (found.int() - expected.int()).abs().max() <= 1, name
        assert (found != expected).float().mean() < 0.01, name
        assert torch.equal(found, image) == (name == "Identity"), name


def test_rand_augment_applies_two_operations_that_are_drawn_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, int]] = []
    for name in augmentation.RAND_AUGMENT_OPERATIONS:
        monkeypatch.setitem(
            augmentation.RAND_AUGMENT_OPERATIONS,
            name,
            lambda image, signed, name=name: (called.append((name, round(signed * 30))), image)[1],
        )
    for row in range(1400):
        rand_augment(torch.zeros(3, 2, 2, dtype=torch.uint8), (3, 0, row))

    counts = Counter(name for name, _ in called)
    assert len(called) == 2800
    assert counts.keys() == augmentation.RAND_AUGMENT_OPERATIONS.keys()
    # 200 are expected of each, with a standard deviation of 14.
    assert all(130 < count < 270 for count in counts.values())
    signs = Counter(sign for _, sign in called)
    assert signs.keys() == {9, -9}
    assert 1200 < signs[9] < 1600
