import io

import numpy as np
import pytest
import torch
from PIL import Image

from patches.images.decoding import decode
from tests.multitask.data.images import encode, pixels, smooth
from tests.multitask.data.images import tensor as encoded
from tests.multitask.data.tables import png


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
