import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

from patches.images.png import SIGNATURE, decode_png
from tests.multitask.data.images import encode, join_png, pixels, split_png, tensor

COLOUR = Image.fromarray(pixels(9, 7, 3))


def raw_png(width: int, height: int, bits: int, colour: int, channels: int) -> bytes:
    """Random pixels of a kind that Pillow does not write; colour 3 has a palette."""
    lines = (b"\0" + pixels(-(-width * bits * channels // 8), seed=line).tobytes() for line in range(height))
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, colour, 0, 0, 0])
    palette = [(b"PLTE", pixels(3 << bits).tobytes())] if colour == 3 else []
    return join_png([(b"IHDR", header), *palette, (b"IDAT", zlib.compress(b"".join(lines))), (b"IEND", b"")])


KINDS = {
    "RGB": encode(COLOUR, "PNG"),
    "RGB with a transparent colour": encode(COLOUR, "PNG", transparency=(1, 2, 3)),
    "RGBA": encode(pixels(9, 7, 4), "PNG"),
    "grey": encode(COLOUR.convert("L"), "PNG"),
    "grey with alpha": encode(Image.fromarray(pixels(9, 7, 4)).convert("LA"), "PNG"),
    "palette": encode(COLOUR.quantize(16), "PNG"),
    "palette with transparency": encode(COLOUR.quantize(16), "PNG", transparency=bytes(range(16))),
    "1 bit": encode(COLOUR.convert("1"), "PNG"),
    "2 bits grey": raw_png(8, 5, 2, 0, 1),
    "4 bits palette": raw_png(8, 5, 4, 3, 1),
    "16 bits grey": encode(np.arange(63, dtype=np.uint16).reshape(9, 7) * 1040, "PNG"),
    "16 bits grey with alpha": raw_png(7, 9, 16, 4, 2),
    "16 bits RGB": raw_png(7, 9, 16, 2, 3),
    "16 bits RGBA": raw_png(7, 9, 16, 6, 4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_png_has_the_pixels_that_libpng_finds(kind: str) -> None:
    expected = F.to_dtype(decode_image(tensor(KINDS[kind]), mode=ImageReadMode.RGB), torch.uint8, scale=True)
    assert torch.equal(decode_png(KINDS[kind]), expected)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(len(SIGNATURE), len(KINDS["RGB"]) - 1), value=st.integers(1, 255))
def test_a_changed_byte_is_an_error_and_never_another_picture(place: int, value: int) -> None:
    changed = bytearray(KINDS["RGB"])
    changed[place] ^= value
    with pytest.raises(RuntimeError, match="PNG that is damaged or incomplete"):
        decode_png(bytes(changed))


def test_a_png_that_is_cut_off_says_so_in_words() -> None:
    with pytest.raises(RuntimeError, match=r"damaged or incomplete: it ends before its last chunk\.$"):
        decode_png(KINDS["RGB"][:20])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damage_under_right_checksums_is_one_kind_of_error_or_a_picture(data: st.DataObject) -> None:
    parts = split_png(KINDS[data.draw(st.sampled_from(sorted(KINDS)))])
    number = data.draw(st.integers(0, len(parts) - 1))
    kind, content = parts[number]
    cut = data.draw(st.integers(0, len(content)))
    parts[number] = (
        kind,
        content[:cut] + data.draw(st.binary(max_size=3)) + content[cut + data.draw(st.integers(0, 3)) :],
    )
    parts.insert(data.draw(st.integers(0, len(parts))), data.draw(st.sampled_from(parts)))
    try:
        decoded = decode_png(join_png(parts))
    except RuntimeError:
        return
    assert decoded.dtype == torch.uint8
    assert decoded.shape[0] == 3


def test_a_png_that_claims_too_many_pixels_takes_no_memory_for_them() -> None:
    (kind, header), *others = split_png(KINDS["grey"])
    claims = (60_000).to_bytes(4, "big") * 2 + header[8:]
    with pytest.raises(RuntimeError, match="exceeds limit"):
        decode_png(join_png([(kind, claims), *others]))
