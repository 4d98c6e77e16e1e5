"""`multitask data` as a user sees it."""

import json
from contextlib import nullcontext
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from PIL import Image

from multitask.cluster import session
from multitask.data import importing, open_table, write_table
from patches.images.decoding import decode
from tests.jobs.command import multitask
from tests.multitask.data.images import tensor, turned
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
def test_images_are_scaled_converted_and_read_as_stored_on_request(folder: Path, tmp_path: Path) -> None:
    picture = Image.fromarray(np.zeros((40, 90, 3), np.uint8))
    picture.save(folder / CLASSES[0] / "large.png")
    picture.crop((0, 0, 9, 4)).save(folder / CLASSES[0] / "small.bmp")
    (folder / CLASSES[0] / "turned.jpg").write_bytes(turned(np.zeros((4, 9, 3), np.uint8), "JPEG", 6))
    done = data("import", "imagefolder", folder, tmp_path / "out", "--max-side", "45", "--ignore-orientation")
    assert done.returncode == 0
    assert "Stored as PNG, which training can read: .bmp (1)." in done.stderr
    table = open_table(tmp_path / "out")
    rows = {row.id: row for row in (table.row(i) for i in range(table.num_rows))}
    assert rows[f"{CLASSES[0]}/large.png"].image[:3] == b"\xff\xd8\xff"
    assert decode(tensor(rows[f"{CLASSES[0]}/small.bmp"].image)).shape == (3, 4, 9)
    assert decode(tensor(rows[f"{CLASSES[0]}/turned.jpg"].image)).shape == (3, 4, 9)
    assert rows[f"{CLASSES[0]}/{CLASSES[0]}_0.JPEG"].image == number_image(0)


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sources that the command was about to import; nothing is written, and no Ray is started."""
    sources: list[Any] = []

    def import_table(source: Any, *_: object, **__: object) -> dict[str, int]:
        sources.append(source)
        return {"": len(source.labels)}

    monkeypatch.setattr(importing, "import_table", import_table)
    monkeypatch.setattr(session, "ray_session", nullcontext)
    return sources


@pytest.mark.parametrize(
    "text",
    [
        b"n02084071\nn01443537\nn01440764",
        b"\xef\xbb\xbfn02084071\nn01443537\nn01440764\n",
        b"n02084071\r\nn01443537\r\nn01440764\r\n",
        b"n02084071 \n\n\tn01443537\x0c\nn01440764\n \n\n",
    ],
    ids=["no last newline", "byte order mark", "Windows", "spaces and empty lines"],
)
def test_a_file_of_class_names_is_read_as_editors_write_it(
    folder: Path, tmp_path: Path, imported: list[Any], text: bytes
) -> None:
    (tmp_path / "classes.txt").write_bytes(text)
    done = data("import", "imagefolder", folder, tmp_path / "out", "--classes", tmp_path / "classes.txt")
    assert done.returncode == 0, done.stderr
    assert imported[0].classes == CLASSES[::-1]


def test_a_file_of_class_names_that_is_no_utf_8_is_refused(folder: Path, tmp_path: Path, imported: list[Any]) -> None:
    (tmp_path / "classes.txt").write_bytes("caf\u00e9\n".encode("latin-1"))
    done = data("import", "imagefolder", folder, tmp_path / "out", "--classes", tmp_path / "classes.txt")
    assert done.returncode == 1
    assert "classes.txt: found byte 0xe9 at place 3, expected text in UTF-8" in done.stderr
    assert imported == []


def test_what_an_import_leaves_aside_is_said_before_it(folder: Path, tmp_path: Path, imported: list[Any]) -> None:
    (folder / CLASSES[0] / "raw.heic").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")
    done = data("import", "imagefolder", folder, tmp_path / "out")
    assert done.stderr.startswith("Left aside: files .heic (1), hidden files and folders (1).\n")
    assert len(imported) == 1


def test_names_are_shown_as_they_are(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    names = ["cash$\\bad$", "$$", "\u732b", "apple [/green]"]
    write_table(tmp_path / "t[/x]", [(number_image(row), row) for row in range(4)], names)
    assert data("head", tmp_path / "t[/x]", "--to", tmp_path / "sheet.png").returncode == 0
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    described = data("inspect", tmp_path / "t[/x]")
    assert described.returncode == 0
    assert f"{tmp_path}/t[/x]" in described.stdout


def test_images_that_cannot_be_decoded_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tmp_path / "t", [(number_image(0), 0, "a"), (b"no image", 0, "b")], ["x"])
    assert data("verify", tmp_path / "t").returncode == 0
    monkeypatch.setattr("multitask.progress.LINE_EVERY_S", 0)
    found = data("verify", tmp_path / "t", "--decode")
    assert found.returncode == 1
    assert found.stderr.startswith("decoding: 2 of 2 images")
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
