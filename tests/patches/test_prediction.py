"""Answers to images: those of the models, in order, and errors where images cannot be decoded."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torchvision.transforms.v2 as v2
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import patches
from patches import Answer, BundleError, ImageError, PatchBank, PatchError, Preprocessing
from patches.prediction import answer_in_batches, answers_of
from tests.multitask.data.images import encode, pixels
from tests.patches.helpers import small_backbone

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEWS = {"pets": Preprocessing(16, MEAN, STD, "center_crop"), "cars": Preprocessing(20, MEAN, (0.3, 0.2, 0.1))}
CLASSES = {"pets": ["cat", "dog", "猫"], "cars": ["a", "b", "c", "d"]}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of two tasks with heads of their own."""
    folder = tmp_path_factory.mktemp("export")
    backbone = small_backbone()
    backbone.save(folder / "backbone.safetensors")
    for seed, (task, classes) in enumerate(CLASSES.items()):
        model = patches.attach(backbone, "scale_bias+last_layer", len(classes), seed=seed)
        preprocessing = VIEWS[task].as_json()
        patches.save_bundle(model, folder / f"{task}.patch", classes=classes, preprocessing=preprocessing)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five files of several sizes."""
    paths = [tmp_path_factory.mktemp("photos") / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(encode(pixels(18 + 5 * number, 24, 3, seed=number), "PNG"))
    return paths


def test_answers_are_those_of_the_models_on_torchvisions_tensors(export: Path, photos: list[Path]) -> None:
    bank = patches.open_export(export)
    assert bank.tasks == ("cars", "pets")
    assert {task: bank.preprocessing(task) for task in bank.tasks} == VIEWS
    resize = {"pets": [v2.Resize(16, antialias=True), v2.CenterCrop(16)], "cars": [v2.Resize((20, 20), antialias=True)]}
    for task, names in CLASSES.items():
        view = VIEWS[task]
        change = v2.Compose([v2.PILToTensor(), *resize[task], v2.ToDtype(torch.float64, scale=True)])
        images = torch.stack([v2.functional.normalize(change(Image.open(p)), view.mean, view.std) for p in photos])
        with torch.no_grad():
            logits = bank.models[task](images.float())
        answers = bank.predict(photos, task)
        torch.testing.assert_close(torch.stack([answer.logits for answer in answers]), logits, rtol=1e-4, atol=1e-5)
        for answer, own in zip(answers, logits.double(), strict=True):
            expected = own.exp() / own.exp().sum()
            torch.testing.assert_close(answer.probabilities.double(), expected, rtol=1e-4, atol=1e-6)
            assert answer.task == task
            assert answer.class_name == names[int(own.argmax())]
            assert answer.probability == pytest.approx(float(expected.max()), rel=1e-4)


def test_an_image_has_the_same_answer_in_every_form(export: Path, photos: list[Path]) -> None:
    bank = patches.open_export(export)
    expected = bank.predict(photos, "pets")
    for images in (
        map(str, photos),
        [photo.read_bytes() for photo in photos],
        [Image.open(photo) for photo in photos],
        [v2.functional.pil_to_tensor(Image.open(photo)) for photo in photos],
    ):
        for answer, wanted in zip(bank.predict(images, "pets"), expected, strict=True):
            assert torch.equal(answer.logits, wanted.logits)
            assert (answer.class_name, answer.probability) == (wanted.class_name, wanted.probability)


def test_the_first_image_that_cannot_be_decoded_is_named_and_the_others_can_be_answered(
    export: Path, photos: list[Path], tmp_path: Path
) -> None:
    bank = patches.open_export(export)
    (tmp_path / "cut.png").write_bytes(photos[0].read_bytes()[:-20])
    images = [photos[0], tmp_path / "cut.png", photos[1], b"nothing", photos[2]]
    with pytest.raises(ImageError, match=r"cut\.png: Found a PNG that is damaged"):
        bank.predict(images, "pets")
    found = list(bank.answers(images, "pets", batch_size=2))
    whole = [answer for answer in found if isinstance(answer, Answer)]
    assert [type(answer) for answer in found] == [Answer, ImageError, Answer, ImageError, Answer]
    # The batches are those of the images that can be decoded, as in an evaluation that skips the others.
    for answer, wanted in zip(whole, bank.predict(photos[:3], "pets", batch_size=2), strict=True):
        assert torch.equal(answer.logits, wanted.logits)


def test_the_only_task_needs_no_name(export: Path, photos: list[Path]) -> None:
    bank = patches.open_export(export)
    one = PatchBank(bank.backbone)
    one.add("pets", export / "pets.patch")
    assert [answer.class_name for answer in one.predict(photos)] == [a.class_name for a in bank.predict(photos, "pets")]
    assert one.classes() == tuple(CLASSES["pets"])
    assert one.predict([]) == []
    with pytest.raises(PatchError, match="because there are 2: cars, pets"):
        bank.predict(photos)


def test_what_cannot_be_answered_is_refused_before_an_image_is_read(export: Path, tmp_path: Path) -> None:
    bank = patches.open_export(export)
    missing = [tmp_path / "none.jpg"]
    with pytest.raises(PatchError, match=r"Unknown task of this bank 'pet'\. Did you mean 'pets'"):
        bank.answers(missing, "pet")
    with pytest.raises(PatchError, match="found a single str"):
        bank.answers("none.jpg", "pets")
    with pytest.raises(PatchError, match="batch_size is 0"):
        bank.answers(missing, "pets", batch_size=0)
    bank.add("host")
    with pytest.raises(PatchError, match="'host' has no class names"):
        bank.answers(missing, "host")
    bank.add("fresh", patches.attach(bank.backbone, "last_layer", 3))
    with pytest.raises(PatchError, match="'fresh' has no class names"):
        bank.answers(missing, "fresh")
    model = bank.models["pets"]
    for number, (preprocessing, message) in enumerate(
        [({}, "found no mean, resolution, std"), (VIEWS["pets"].as_json() | {"resize": "x"}, "resize='x'")]
    ):
        patches.save_bundle(model, tmp_path / "old.patch", classes=CLASSES["pets"], preprocessing=preprocessing)
        bank.add(f"old{number}", tmp_path / "old.patch")
        with pytest.raises(PatchError, match=f"Task 'old{number}': .*{message}"):
            bank.answers(missing, f"old{number}")


@pytest.mark.parametrize("lacks", ["backbone.safetensors", "*.patch", "*"])
def test_a_folder_that_is_no_export_is_refused(export: Path, tmp_path: Path, lacks: str) -> None:
    for path in set(export.iterdir()) - set(export.glob(lacks)):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(BundleError, match="multitask export"):
        patches.open_export(tmp_path)


@given(kinds=st.lists(st.booleans(), max_size=20), batch_size=st.integers(1, 6))
def test_every_image_gets_its_own_answer_or_error_in_batches_without_gaps(kinds: list[bool], batch_size: int) -> None:
    images = [torch.tensor(number) if kind else ImageError(str(number)) for number, kind in enumerate(kinds)]
    batches = []

    def answer(batch: list[Tensor]) -> Iterable[Answer]:
        batches.append(len(batch))
        return answers_of(list(map(str, batch)), ["only"], torch.zeros(len(batch), 1))

    found = list(answer_in_batches(images, batch_size, answer))
    assert len(found) == len(images)
    for given_image, got in zip(images, found, strict=True):
        assert got is given_image if isinstance(given_image, ImageError) else got.task == str(given_image)
    whole = sum(kinds)
    assert batches == [batch_size] * (whole // batch_size) + [whole % batch_size] * (whole % batch_size > 0)
