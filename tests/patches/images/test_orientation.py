import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from multitask.data.encoding import limit_side
from patches.images.decoding import decode
from patches.images.orientation import read_orientation, without_orientation
from tests.multitask.data.images import MAKER, encode, pixels, tensor, turned

# Blocks of one colour, so that JPEG changes them little.
PICTURE = np.array(Image.fromarray(pixels(2, 3, 3)).resize((48, 32), Image.Resampling.NEAREST))
KINDS = ("JPEG", "PNG", "WEBP")


def as_pillow_turns_it(image: bytes) -> torch.Tensor:
    opened = ImageOps.exif_transpose(Image.open(io.BytesIO(image)))
    return torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decoding_turns_and_mirrors_an_image_as_its_exif_says(kind: str, orientation: int) -> None:
    image = turned(PICTURE, kind, orientation)
    assert read_orientation(image) == orientation
    torch.testing.assert_close(decode(tensor(image)), as_pillow_turns_it(image), atol=2, rtol=0)


def test_exif_may_stand_behind_the_pixels_of_a_png_and_behind_fill_bytes_of_a_jpeg() -> None:
    png, jpeg = turned(PICTURE, "PNG", 6), turned(PICTURE, "JPEG", 6)
    start = png.index(b"eXIf") - 4
    block = png[start : start + 12 + int.from_bytes(png[start : start + 4])]
    rest = png.replace(block, b"")
    end = rest.index(b"IEND") - 4
    moved = {rest[:end] + block + rest[end:]: png, jpeg[:2] + b"\xff\xff\xff" + jpeg[2:]: jpeg}
    for image, usual in moved.items():
        assert image != usual
        assert torch.equal(decode(tensor(image)), decode(tensor(usual)))
        assert torch.equal(decode(tensor(without_orientation(image))), decode(tensor(without_orientation(usual))))


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_is_scaled_down_is_upright_and_stays_so(kind: str) -> None:
    image = turned(PICTURE, kind, 6)
    small = limit_side(image, 24, "x")
    assert Image.open(io.BytesIO(small)).size == (16, 24)
    assert read_orientation(small) == 1
    expected = decode(tensor(image)).float().mean((1, 2))
    torch.testing.assert_close(decode(tensor(small)).float().mean((1, 2)), expected, atol=3, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", [3, 6])
def test_an_ignored_orientation_leaves_the_stored_pixels_and_all_other_tags(kind: str, orientation: int) -> None:
    image = turned(PICTURE, kind, orientation)
    plain = without_orientation(image)
    torch.testing.assert_close(decode(tensor(plain)), decode(tensor(encode(PICTURE, kind, lossless=True, quality=95))))
    assert Image.open(io.BytesIO(plain)).getexif()[MAKER] == "maker"
    # One byte of the tag, and in a PNG the four of the checksum.
    assert sum(a != b for a, b in zip(image, plain, strict=True)) <= (5 if kind == "PNG" else 1)


@pytest.mark.parametrize("kind", [*KINDS, "GIF", "BMP", "PPM"])
def test_an_image_without_exif_is_left_as_it_is(kind: str) -> None:
    image = encode(PICTURE, kind)
    assert read_orientation(image) == 1
    assert without_orientation(image) == image


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_tags_are_no_orientation(kind: str) -> None:
    image = turned(PICTURE, kind, 6)
    start = image.index(b"MM\0*")
    for place in range(start, start + 24):
        for value in (0, 255):
            assert read_orientation(image[:place] + bytes([value]) + image[place + 1 :]) in range(1, 9)
    assert [read_orientation(image[:size]) for size in range(start)] == [1] * start
