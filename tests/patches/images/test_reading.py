import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from patches import ImageError, Preprocessing
from patches.images.decoding import decode
from patches.images.reading import ImageLike, read_pixels, read_squares, read_whole
from patches.images.resizing import resize_images
from tests.multitask.data.images import encode, pixels, tensor, turned

PICTURE = pixels(9, 7, 3)
VIEW = Preprocessing(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "pad")


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def kinds(folder: Path, content: bytes) -> list[ImageLike]:
    """One image in every form in which it can be given."""
    (folder / "photo").write_bytes(content)
    path = folder / "photo"
    return [path, str(path), content, opened(content), decode(tensor(content))]


@pytest.mark.parametrize("content", [encode(PICTURE, "PNG"), turned(PICTURE, "PNG", 6), turned(PICTURE, "WEBP", 7)])
def test_an_image_has_the_pixels_of_training_in_whatever_form_it_is_given(tmp_path: Path, content: bytes) -> None:
    expected = decode(tensor(content))
    for image in kinds(tmp_path, content):
        assert torch.equal(read_pixels(image), expected), type(image)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(PICTURE).convert("L"),
        Image.fromarray(pixels(9, 7, 4)),
        Image.fromarray(PICTURE).quantize(16),
        Image.fromarray(PICTURE).convert("1"),
        Image.fromarray((np.arange(63) * 1040).astype(np.uint16).reshape(9, 7)),
    ],
    ids=["grey", "alpha", "palette", "1 bit", "16 bits"],
)
def test_an_image_of_pillow_has_the_pixels_of_its_png(image: Image.Image) -> None:
    assert torch.equal(read_pixels(image), decode(tensor(encode(image, "PNG"))))


def test_a_bitmap_has_the_pixels_that_an_import_stores() -> None:
    assert torch.equal(read_pixels(encode(PICTURE, "BMP")), torch.from_numpy(PICTURE).permute(2, 0, 1))


def test_one_image_of_pillow_may_be_given_many_times() -> None:
    """Pillow loads it when its pixels are first needed, which no two threads may do at once."""
    photo = np.array(Image.fromarray(pixels(8, 8, 3)).resize((600, 500)))
    torch.set_num_threads(4)
    found = list(read_squares([opened(encode(photo, "JPEG"))] * 64, VIEW))
    assert all(isinstance(square, Tensor) and torch.equal(square, found[0]) for square in found)


@pytest.mark.parametrize("threads", [1, 3])
def test_images_come_in_order_whatever_the_number_of_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    images = [torch.from_numpy(pixels(3, 5 + number % 7, 9, seed=number)) for number in range(300)]
    squares = list(read_squares(iter(images), VIEW))
    expected = resize_images(images, [8], len(images), VIEW.framing)[8]
    assert torch.equal(torch.stack([square for square in squares if isinstance(square, Tensor)]), expected)
    assert all(torch.equal(whole, image) for whole, image in zip(read_whole(images), images, strict=True))


def test_what_is_no_image_is_named_in_its_place(tmp_path: Path) -> None:
    whole = encode(PICTURE, "JPEG")
    (tmp_path / "cut [x].jpg").write_bytes(whole[: len(whole) // 2])
    images: list[ImageLike] = [
        whole,
        tmp_path / "cut [x].jpg",
        tmp_path / "none.jpg",
        tmp_path,
        b"",
        b"no image",
        whole,
        opened(whole[:-40]),
        Image.fromarray(PICTURE).convert("F"),
        torch.zeros(3, 4, 4),
        torch.zeros(4, 4, 3, dtype=torch.uint8),
        7,  # type: ignore[list-item]
    ]
    reasons = [
        f"{tmp_path}/cut [x].jpg: ",
        f"{tmp_path}/none.jpg: No such file",
        f"{tmp_path}: Is a directory",
        "Image 4 (counted from 0): it is empty",
        "Image 5 (counted from 0): ",
        "Image 7 (counted from 0): ",
        "Image 8 (counted from 0): its pixels are of Pillow's mode F",
        "Image 9 (counted from 0): it has shape [3, 4, 4] and type torch.float32, expected [3, height, width]",
        "Image 10 (counted from 0): it has shape [4, 4, 3]",
        "Image 11 (counted from 0): it is a int",
    ]
    for found in (list(read_squares(images, VIEW)), list(read_whole(images))):
        errors = [image for image in found if isinstance(image, ImageError)]
        assert [place for place, image in enumerate(found) if isinstance(image, Tensor)] == [0, 6]
        for error, reason in zip(errors, reasons, strict=True):
            assert str(error).startswith(reason)


def test_images_are_read_only_a_bounded_number_ahead() -> None:
    taken = []

    def images() -> Iterator[Tensor]:
        for number in range(10_000):
            taken.append(number)
            yield torch.zeros(3, 4, 4, dtype=torch.uint8)

    squares = read_squares(images(), VIEW)
    next(squares)
    assert len(taken) < 300
    squares.close()
