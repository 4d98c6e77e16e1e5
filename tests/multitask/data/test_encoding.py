import io

import numpy as np
import pytest
import torch
from PIL import Image

from multitask.data import DataError
from multitask.data.encoding import limit_side, readable
from patches.images.decoding import decode
from tests.multitask.data.images import ORIENTATION, encode, pixels, tensor
from tests.multitask.data.tables import png

COLOUR = Image.fromarray(pixels(9, 7, 3))
DEEP_GREY = Image.fromarray(np.linspace(0, 65535, 63).astype(np.uint16).reshape(9, 7))


@pytest.mark.parametrize("kind", ["BMP", "PPM", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_a_format_that_training_cannot_read_is_stored_as_png_with_the_same_pixels(kind: str, mode: str) -> None:
    image = COLOUR.convert(mode)
    with pytest.raises(RuntimeError):
        decode(tensor(encode(image, kind)))
    stored = readable(encode(image, kind), "x")
    assert Image.open(io.BytesIO(stored)).format == "PNG"
    assert torch.equal(decode(tensor(stored)), decode(tensor(encode(image, "PNG"))))


@pytest.mark.parametrize("kind", ["PPM", "TIFF"])
def test_16_bits_of_such_a_format_stay_16_bits(kind: str) -> None:
    stored = readable(encode(DEEP_GREY, kind), "x")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored))), np.asarray(DEEP_GREY))


def test_a_tiff_is_stored_upright() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    stored = decode(tensor(readable(encode(COLOUR, "TIFF", exif=exif), "x")))
    assert np.array_equal(stored.permute(1, 2, 0), np.asarray(COLOUR.transpose(Image.Transpose.ROTATE_270)))


def test_a_cmyk_tiff_is_stored_in_colours() -> None:
    stored = decode(tensor(readable(encode(COLOUR.convert("CMYK"), "TIFF"), "x")))
    assert np.array_equal(stored.permute(1, 2, 0), np.asarray(COLOUR.convert("CMYK").convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_formats_that_training_reads_keep_their_bytes(kind: str) -> None:
    image = encode(COLOUR, kind)
    assert readable(image, "x") == image
    assert readable(image[:40], "x") == image[:40]


@pytest.mark.parametrize("content", [b"", b"BM", b"<html>", b"P9 no image", b"II*\0"])
def test_what_is_no_image_keeps_its_bytes_and_fails_in_training(content: bytes) -> None:
    assert readable(content, "x") == content
    with pytest.raises(RuntimeError):
        decode(tensor(content) if content else torch.empty(0, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (encode(COLOUR, "BMP")[:100], "truncated"),
        (encode(COLOUR, "TIFF", save_all=True, append_images=[COLOUR]), "2 pages, expected one"),
        (encode(COLOUR.convert("F"), "TIFF"), "mode F, expected 1, 8 or 16 bits"),
        (encode(COLOUR.convert("I"), "TIFF"), "mode I, expected 1, 8 or 16 bits"),
    ],
)
def test_an_image_that_cannot_become_a_png_is_named_at_the_import(image: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=rf"cat/7\.tif: found an image that cannot be decoded .*{reason}"):
        readable(image, "cat/7.tif")


def test_a_scaled_16_bit_image_is_as_bright_as_training_sees_it() -> None:
    image = png(np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1)))
    small = decode(tensor(limit_side(image, 32, "x"))).float()
    assert abs(small.mean() - decode(tensor(image)).float().mean()) < 2


def test_a_scaled_image_drops_transparency_as_training_does() -> None:
    image = np.dstack([np.full((64, 64, 3), 200, np.uint8), np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))])
    assert (decode(tensor(limit_side(png(image), 32, "x"))).int() - 200).abs().max() <= 2


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns about damaged tags of a TIFF
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_whatever_is_wrong_with_an_image_that_must_be_decoded_names_it(kind: str) -> None:
    image = encode(Image.fromarray(pixels(20, 20, 3)), kind)
    random, messages = np.random.default_rng(0), []
    for number in range(40):
        damaged = bytearray(image)
        if number % 2:
            del damaged[int(random.integers(8, len(damaged))) :]
        else:
            damaged[int(random.integers(len(damaged)))] ^= 255
        try:
            limit_side(readable(bytes(damaged), "cat/7"), 10, "cat/7")
        except DataError as error:
            messages.append(str(error))
    assert messages
    assert all(text.startswith("cat/7: found an image that cannot be decoded") for text in messages)
    assert max(map(len, messages)) < 1000
