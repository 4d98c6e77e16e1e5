"""`multitask data` as a user sees it."""

import json
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from PIL import Image

from multitask.data import open_table, write_table
from tests.jobs.command import multitask
from tests.multitask.data.tables import number_image, small_table

CLASSES = ("n01440764", "n01443537", "n02084071")


def data(*arguments: object) -> CompletedProcess[str]:
    return multitask("data", *arguments)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for row in range(30):
        path = tmp_path / "train" / CLASSES[row % 3]
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{CLASSES[row % 3]}_{row}.JPEG").write_bytes(number_image(row))
    return tmp_path / "train"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_import_inspect_verify_head(folder: Path, tmp_path: Path) -> None:
    target, sheet = tmp_path / "tables", tmp_path / "sheet.png"
    imported = data("import", "imagefolder", folder, target, "--split", "train=0.8", "--split", "test=0.2")
    assert imported.returncode == 0, imported.stderr
    assert f"{target}/train: 24 images of 3 classes" in imported.stdout

    described = json.loads(data("inspect", target, "--json").stdout)
    assert described[f"{target}/train"]["images"] == 24
    assert described[f"{target}/test"]["classes"] == dict.fromkeys(CLASSES, 2)
    assert "30" not in data("inspect", f"{target}/train").stdout

    verified = data("verify", target, "--decode")
    assert verified.returncode == 0
    assert f"{target}/test: 6 images in 1 files are as the index says" in verified.stdout

    assert data("head", f"{target}/train", "--images", "5", "--to", sheet).returncode == 0
    with Image.open(sheet) as picture:
        assert min(picture.size) > 100


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_maximum_side_scales_images_down(folder: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((40, 90, 3), np.uint8)).save(folder / CLASSES[0] / "large.png")
    assert data("import", "imagefolder", folder, tmp_path / "out", "--max-side", "45", "--keep-order").returncode == 0
    table = open_table(tmp_path / "out")
    rows = {row.id: row for row in (table.row(i) for i in range(table.num_rows))}
    assert rows[f"{CLASSES[0]}/large.png"].image[:3] == b"\xff\xd8\xff"
    assert rows[f"{CLASSES[0]}/{CLASSES[0]}_0.JPEG"].image == number_image(0)


def test_images_that_cannot_be_decoded_are_named(tmp_path: Path) -> None:
    write_table(tmp_path / "t", [(number_image(0), 0, "a"), (b"no image", 0, "b")], ["x"])
    assert data("verify", tmp_path / "t").returncode == 0
    found = data("verify", tmp_path / "t", "--decode")
    assert found.returncode == 1
    assert "shard-00000.parquet, row 1 (b): cannot be decoded" in found.stdout
    assert "1 images cannot be decoded" in found.stderr
    assert data("head", tmp_path / "t", "--to", tmp_path / "sheet.png").returncode == 0


def test_a_damaged_shard_fails_the_check(tmp_path: Path) -> None:
    path = small_table(tmp_path / "t")
    shard = path / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert "expected" in data("verify", path).stderr


@pytest.mark.parametrize("split", ["train", "=0.5", "train="])
def test_a_split_without_its_share_is_refused(folder: Path, tmp_path: Path, split: str) -> None:
    refused = data("import", "imagefolder", folder, tmp_path / "out", "--split", split)
    assert refused.returncode == 2
    assert "expected NAME=VALUE" in refused.stderr
    assert not (tmp_path / "out").exists()
