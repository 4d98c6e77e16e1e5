import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from multitask.data import DataError
from multitask.data.sources import webdataset
from tests.multitask.data.sources.trees import check_source, image

Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members) -> Path:
    """As webdataset.TarWriter does: plain tar, one regular member for each ending, GNU format, end mark at close."""
    with tarfile.open(path, "w|") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.uname, info.gname = len(content), 0o444, "bigdata", "bigdata"
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(key: str, number: int, label: int) -> Members:
    """TarWriter sorts the endings of a sample."""
    return [(f"{key}.cls", str(label).encode()), (f"{key}.jpg", image(number))]


def test_samples_come_in_the_order_of_tars_and_members(tmp_path: Path) -> None:
    for tar in range(12):
        write_tar(tmp_path / f"train-{tar:06d}.tar", sample("000000", 2 * tar, tar) + sample("000001", 2 * tar + 1, 0))
    write_tar(tmp_path / "val-000000.tar", sample("000000", 99, 0))
    ids = [f"train-{tar:06d}.tar/00000{key}" for tar in range(12) for key in range(2)]
    labels = [label for tar in range(12) for label in (tar, 0)]

    source = webdataset(str(tmp_path / "train-{000000..000011}.tar"))

    check_source(source, [image(number) for number in range(24)], labels, ids)
    assert source.classes == tuple(str(label) for label in range(12))
    assert webdataset(tmp_path / "train-*.tar").ids.equals(source.ids)
    with pytest.raises(DataError, match=rf"has the splits \['train', 'validation'\].*'{tmp_path}/train-0000\*.tar'"):
        webdataset(tmp_path)
    named = webdataset(
        [tmp_path / "train-000009.tar", tmp_path / "val-000000.tar"], classes=[f"c{i}" for i in range(20)]
    )
    assert named.ids.to_pylist() == ["train-000009.tar/000000", "train-000009.tar/000001", "val-000000.tar/000000"]
    assert named.classes[9] == "c9"


@pytest.mark.parametrize(
    ("pattern", "found"), [("{8..10}.tar", ["10", "8", "9"]), ("{08..10}.tar", ["08", "09", "10"])]
)
def test_braces_are_a_shells(tmp_path: Path, pattern: str, found: list[str]) -> None:
    for number in ["8", "9", "10", "08", "09"]:
        write_tar(tmp_path / f"{number}.tar", sample("a", 0, 0))

    assert sorted(webdataset(tmp_path / pattern).ids.to_pylist()) == [f"{number}.tar/a" for number in found]


def test_members_are_grouped_by_the_library_rule(tmp_path: Path) -> None:
    members = [
        ("__note__", b"{}"),
        ("README", b"no ending"),
        ("dir.v1/a.png", image(0, "PNG")),
        ("dir.v1/a.JSON", json.dumps({"label": 4, "prompt": "x"}).encode()),
        ("dir.v1/a.seg.png", b"another ending"),
        ("./b.img", image(1)),
        ("./b.cls", b"2\n"),
        ("./b.json", b"not read"),
        ("./b.jpg", image(2)),
    ]
    source = webdataset(write_tar(tmp_path / "one.tar", members), image_keys=("img", "jpg", "png"))

    check_source(source, [image(0, "PNG"), image(1)], [4, 2], ["one.tar/dir.v1/a", "one.tar/./b"])


def test_hard_links_are_the_files_that_they_lead_to(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("README", b"1"), *sample("a", 0, 0)])
    with tarfile.open(path, "a") as tar:
        for name, goal in (("b.jpg", "a.jpg"), ("b.cls", "a.cls"), ("c.jpg", "b.jpg"), ("c.cls", "README")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, goal
            tar.addfile(link)

    check_source(webdataset(path), [image(0)] * 3, [0, 0, 1], [f"x.tar/{key}" for key in "abc"])


@pytest.mark.parametrize(("kind", "goal"), [(tarfile.SYMTYPE, "a.jpg"), (tarfile.LNKTYPE, "gone.jpg")])
def test_a_link_that_cannot_be_read_is_named(tmp_path: Path, kind: bytes, goal: str) -> None:
    path = write_tar(tmp_path / "x.tar", sample("a", 0, 0))
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = kind, goal
        tar.addfile(link)

    with pytest.raises(DataError, match=rf"x.tar: member 'b.jpg' links to '{goal}'.* \(tar --dereference"):
        webdataset(path)


def test_hidden_members_and_folders_are_left_aside(tmp_path: Path) -> None:
    hidden = [("__MACOSX/._a.jpg", b"x"), ("__MACOSX/a.jpg", b"x"), ("./.ipynb_checkpoints/a.jpg", b"x")]
    path = write_tar(tmp_path / "x.tar", [*hidden, *sample("a", 0, 1)])

    check_source(webdataset(path), [image(0)], [1], ["x.tar/a"])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.cls", b"1")], r"x.tar: sample 'a' has \['cls'\], expected an image"),
        ([("a.jpg", b""), ("a.cls", b"1")], r"x.tar: sample 'a' has .* not empty"),
        ([("a.jpg", image(0))], r"x.tar: sample 'a' has \['jpg'\], expected a label in 'cls' or 'json'"),
        ([("a.jpg", image(0)), ("a.cls", b"cat")], r"sample 'a' has the label b'cat', expected a class number"),
        ([("a.jpg", image(0)), ("a.json", b'{"label": [0, 2]}')], r"has the label \[0, 2\]; multi-label is not"),
        ([("a.jpg", image(0)), ("a.json", b'{"label": 0.5}')], "has the label 0.5; regression is not supported"),
        ([("a.jpg", image(0)), ("a.json", b'{"caption": 1}')], r"sample 'a' has the label .*caption"),
        (sample("a", 0, 0) + sample("b", 1, 0) + sample("a", 2, 0), "'x.tar/a' and 0 more images are listed more"),
        ([("a.jpg", image(0)), ("a.jpg", image(1)), ("a.cls", b"1")], "sample 'a' has '.jpg' twice"),
        (sample("a", 0, -1), "labels such as -1, expected 0 to"),
        ([], "found zero images"),
    ],
)
def test_a_sample_that_cannot_be_is_named(tmp_path: Path, members: Members, message: str) -> None:
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=message):
        webdataset(tmp_path / "x.tar")


def cut_in_data(content: bytes) -> bytes:
    return content[: 5 * 512 + 100]


def cut_in_header(content: bytes) -> bytes:
    return content[: 4 * 512 + 100]


def cut_between_members(content: bytes) -> bytes:
    return content[: 4 * 512]


def damage_a_header(content: bytes) -> bytes:
    return content[: 6 * 512] + b"????" + content[6 * 512 + 4 :]


@pytest.mark.parametrize("damage", [cut_in_data, cut_in_header, cut_between_members, damage_a_header])
def test_a_tar_that_is_cut_short_is_refused(tmp_path: Path, damage: Any) -> None:
    # Each member takes one block of 512 bytes for its header and one for its content.
    small: Members = [(f"{key}.{ending}", b"1") for key in "abc" for ending in ("cls", "jpg")]
    path = write_tar(tmp_path / "x.tar", small)
    assert len(webdataset(path).labels) == 3
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(DataError, match=r"x.tar: cannot be read past sample '[ab]' .* Copy it again"):
        webdataset(path)


def test_tars_that_cannot_be_opened_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no tars"):
        webdataset(tmp_path)
    with pytest.raises(DataError, match=r"x-1.tar: cannot be read past sample '\(none yet\)'"):
        webdataset(tmp_path / "x-{1..2}.tar")
    with pytest.raises(DataError, match="local disk only"):
        webdataset("https://host/x.tar")
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(b"tar"))
    with pytest.raises(DataError, match=r"x.tar.gz is compressed \(gzip\).*Decompress it first"):
        webdataset(tmp_path / "x.tar.gz")


def test_a_tar_that_vanishes_or_shrinks_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", sample("a", 0, 0) + sample("b", 0, 1))
    source = webdataset(path)
    path.write_bytes(path.read_bytes()[: source.offset_bytes[1] + 5])
    with pytest.raises(DataError, match=r"'x.tar/b': cannot read it from .*x.tar \(5 of"):
        list(source.read([0, 1]))
    path.unlink()
    with pytest.raises(DataError, match=r"'x.tar/a': cannot read it from .*x.tar"):
        list(source.read([0]))
