"""The key `resize` of a task: training, evaluation and prediction see the same pixels."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as v2
from torch import Tensor

import patches
from multitask.cascade.model import pixels as cascade_pixels
from multitask.data import write_table
from multitask.job.job import Job
from multitask.job.models import attach_task
from multitask.job.tables import open_split, preprocessing, table_batches
from multitask.spec.schema import JobSpec
from patches.images.reading import read_squares, read_whole
from patches.images.resizing import network_input
from tests.multitask.data.images import encode, pixels

MakeSpec = Callable[..., JobSpec]
MEAN, STD = (0.5, 0.25, 0.75), (0.25, 0.5, 0.3)
PHOTOS = [pixels(*shape, 3, seed=number) for number, shape in enumerate([(12, 30), (30, 12), (16, 16), (40, 50)] * 3)]
BORDER = torch.tensor([128, 64, 191], dtype=torch.uint8)
"""The mean as pixels: 127.5 is rounded to the even 128, 63.75 to 64 and 191.25 to 191."""


def expected(photo: np.ndarray, resize: str) -> Tensor:
    """What the network reads of a photo at 8 px, made with torchvision: shape (3, 8, 8)."""
    image = torch.from_numpy(photo).permute(2, 0, 1)
    if resize == "squash":
        square = v2.functional.resize(image, [8, 8], antialias=True)
    elif resize == "center_crop":
        square = v2.functional.center_crop(v2.functional.resize(image, [8], antialias=True), [8, 8])
    else:
        square = BORDER[:, None, None].repeat(1, 8, 8)
        height, width = (8 * side // max(image.shape[1:]) for side in image.shape[1:])
        top, left = (8 - height) // 2, (8 - width) // 2
        square[:, top : top + height, left : left + width] = v2.functional.resize(
            image, [height, width], antialias=True
        )
    return (square / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "validation", "test"):
        rows = ((encode(photo, "PNG"), row % 4) for row, photo in enumerate(PHOTOS))
        write_table(folder / split, rows, [f"class {label}" for label in range(4)])
    return folder


@pytest.mark.parametrize("resize", ["squash", "center_crop", "pad"])
def test_training_evaluation_prediction_and_cascades_read_the_pixels_that_torchvision_makes(
    make_spec: MakeSpec, data: Path, tmp_path: Path, resize: str
) -> None:
    spec = make_spec({"pets": {"data": str(data), "resize": resize, "mean": MEAN, "std": STD, "batch_size": 12}})
    (task,) = spec.tasks
    wanted = torch.stack([expected(photo, resize) for photo in PHOTOS])
    job = Job(spec)
    batches = job.make_batches("pets/0")
    trained = next(batches)
    batches.close()
    assert sorted(trained.rows) == list(range(len(PHOTOS)))
    torch.testing.assert_close(trained.images(), wanted[trained.rows])

    (evaluated,) = table_batches(open_split(task, "test"), task)
    torch.testing.assert_close(evaluated.images(), wanted)

    model = attach_task(job.backbone, task, spec)
    classes, content = job.classes["pets"], preprocessing(task).as_json()
    patches.save_bundle(model, tmp_path / "pets.patch", classes=classes, preprocessing=content)
    bank = patches.PatchBank(job.backbone)
    bank.add("pets", tmp_path / "pets.patch")
    view, photos = bank.preprocessing(), [encode(photo, "PNG") for photo in PHOTOS]
    squares = torch.stack([square for square in read_squares(photos, view) if isinstance(square, Tensor)])
    assert torch.equal(network_input(squares, view, "cpu"), evaluated.images())
    whole = [image for image in read_whole(photos) if isinstance(image, Tensor)]
    assert torch.equal(cascade_pixels(whole, view, torch.device("cpu")), evaluated.images())


@pytest.mark.parametrize("resize", ["center_crop", "pad"])
@pytest.mark.parametrize(("augment", "squashed"), [("crop_flip", True), ("resize_crop", True), ("flip", False)])
def test_a_random_crop_is_squashed_whatever_resize_says(
    make_spec: MakeSpec, data: Path, resize: str, augment: str, squashed: bool
) -> None:
    both = []
    for one in ("squash", resize):
        task = {"data": str(data), "resize": one, "augment": augment}
        batches = Job(make_spec({"pets": task})).make_batches("pets/0")
        both.append(next(batches).images())
        batches.close()
    assert torch.equal(*both) == squashed
