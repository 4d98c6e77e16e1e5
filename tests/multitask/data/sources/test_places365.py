from pathlib import Path
from unittest.mock import patch

import pytest
from torchvision.datasets import Places365

from multitask.data import DataError
from multitask.data.sources import places365
from tests.multitask.data.sources.trees import check_source, write_images

CATEGORIES = "/a/airfield 0\n/a/airplane_cabin 1\n/a/apartment_building/outdoor 2\n/b/bank_vault 3\n"
TRAIN = (
    "/a/airfield/00000002.jpg 0\n/a/airfield/00000001.jpg 0\n"
    "/a/apartment_building/outdoor/00000001.jpg 2\n/b/bank_vault/00000007.jpg 3\n"
)
VAL = "Places365_val_00000001.jpg 3\nPlaces365_val_00000002.jpg 1\n"


def lay_out(root: Path) -> tuple[list[bytes], list[bytes]]:
    (root / "categories_places365.txt").write_text(CATEGORIES)
    (root / "places365_train_standard.txt").write_text(TRAIN)
    (root / "places365_val.txt").write_text(VAL)
    train = write_images(root / "data_256_standard", [line.split()[0][1:] for line in TRAIN.splitlines()])
    return train, write_images(root / "val_256", [line.split()[0] for line in VAL.splitlines()])


@pytest.mark.parametrize(
    ("split", "folder", "listed"),
    [("train-standard", "data_256_standard", "places365_train_standard.txt"), ("val", "val_256", "places365_val.txt")],
)
def test_rows_are_those_of_torchvisions_reader(tmp_path: Path, split: str, folder: str, listed: str) -> None:
    images = lay_out(tmp_path)[split == "val"]
    with patch.object(Places365, "_check_integrity", lambda *_: True):
        reference = Places365(str(tmp_path), split, small=True)
    ids = [path.removeprefix(f"{tmp_path}/{folder}/") for path, _ in reference.imgs]

    source = places365(tmp_path / folder, tmp_path / listed, tmp_path / "categories_places365.txt")

    check_source(source, images, reference.targets, ids)
    assert source.classes == ("airfield", "airplane_cabin", "apartment_building/outdoor", "bank_vault")
    assert source.name == listed.removesuffix(".txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Places365_test_00000001.jpg", r"places365_val.txt, line 3: found 'Places365_test_00000001.jpg'"),
        ("Places365_val_00000002.jpg one", "places365_val.txt, line 3: found"),
        ("../secret.jpg 0", r"entry 3 .* '../secret.jpg'"),
        ("//etc/passwd.jpg 0", r"entry 3 .* '/etc/passwd.jpg'"),
        ("Places365_val_00000003.jpg 4", "labels such as 4, expected 0 to 3"),
        ("Places365_val_00000001.jpg 0", "'Places365_val_00000001.jpg' and 0 more images are listed more than once"),
        ("Places365_val_00000003.jpg 0\nx/y.jpg 0", "2 of 4 files are missing .* first 'Places365_val_00000003.jpg'"),
    ],
)
def test_a_line_that_cannot_be_is_named(tmp_path: Path, line: str, message: str) -> None:
    lay_out(tmp_path)
    (tmp_path / "places365_val.txt").write_text(f"{VAL}{line}\n")

    with pytest.raises(DataError, match=message):
        places365(tmp_path / "val_256", tmp_path / "places365_val.txt", tmp_path / "categories_places365.txt")


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ("/a/airfield 0\nairplane_cabin 1\n", r"categories_places365.txt, line 2: found 'airplane_cabin 1'"),
        ("/a/airfield 0\n/b/bank_vault 3\n", "category numbers are not 0 to 1"),
        ("/a/airfield 0\n/b/airfield 1\n", r"\['airfield'\] more than once"),
    ],
)
def test_a_category_list_that_cannot_be_is_refused(tmp_path: Path, categories: str, message: str) -> None:
    lay_out(tmp_path)
    (tmp_path / "categories_places365.txt").write_text(categories)

    with pytest.raises(DataError, match=message):
        places365(tmp_path / "val_256", tmp_path / "places365_val.txt", tmp_path / "categories_places365.txt")


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    lay_out(tmp_path)
    with pytest.raises(DataError, match=r"gone.txt: cannot read this list"):
        places365(tmp_path / "val_256", tmp_path / "gone.txt", tmp_path / "categories_places365.txt")
