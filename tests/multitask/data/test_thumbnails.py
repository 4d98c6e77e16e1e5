"""Small pictures of images."""

import io

import numpy as np
import pytest
from PIL import Image

from multitask.data.thumbnails import thumbnail
from tests.conftest import png


@pytest.mark.parametrize(("size", "kind", "side"), [(400, "JPEG", 100), (12, "PNG", 96), (100, "PNG", 100)])
def test_a_large_image_is_scaled_down_and_a_small_one_stays_sharp(size: int, kind: str, side: int) -> None:
    image = png(0, 2, size)

    picture = Image.open(io.BytesIO(thumbnail(image, 100)))

    assert (picture.format, picture.size) == (kind, (side, side))
    if size < 100:
        pixels = np.asarray(Image.open(io.BytesIO(image)))
        np.testing.assert_array_equal(np.asarray(picture)[4::8, 4::8], pixels)


def test_the_sides_keep_their_ratio() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (300, 150)).save(buffer, "png")

    assert Image.open(io.BytesIO(thumbnail(buffer.getvalue(), 100))).size == (100, 50)
