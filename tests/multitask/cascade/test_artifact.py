"""Files of cascades of any origin: what is no whole cascade is refused with a CascadeError that names the file."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import patches
from multitask.cascade import CascadeError, CascadeModel, load_cascade, save_cascade, save_package
from tests.multitask.cascade.pools import made_cascade
from tests.patches.helpers import small_backbone

HUGE = "ab" * 2_000


def refused(path: Path, read: Callable[[Path], Any] = load_cascade) -> str:
    """Return the message of the error, after checking that it names the file and quotes little of it."""
    with pytest.raises(CascadeError) as error:
        read(path)
    message = str(error.value)
    assert str(path) in message
    assert len(message) < 1000
    assert HUGE[:201] not in message
    return message


def changed(path: Path, change: Callable[[dict], object]) -> Path:
    """Write a cascade's JSON with a change."""
    save_cascade(made_cascade(), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_a_cascade_comes_back_equal(tmp_path: Path) -> None:
    assert load_cascade(changed(tmp_path / "cascade.json", lambda _: None)) == made_cascade()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(points=2.5), "valid array at 'points'"),
        (lambda c: c.update(points=[2.5]), "points.0"),
        (lambda c: c["points"][1]["stages"].clear(), "no stages, or they answer no image"),
        (lambda c: c["points"][1]["stages"][0].update(rule="top2_gap"), "points.1.stages.0.rule"),
        (lambda c: c["points"][1]["stages"][0].update(answered=200.0), "points.1.stages.0.answered"),
        (lambda c: c["points"][1]["stages"][0].update(answered=True), "points.1.stages.0.answered"),
        (lambda c: c["points"][1]["stages"][0].update(answered=10**400), "answers less than 0 images, or more"),
        (lambda c: c["points"][1]["stages"][0].update(right=-1), "answers less than 0 images, or more"),
        (lambda c: c["points"][0]["stages"][0].update(answered=0, right=0), "they answer no image"),
        (lambda c: c["points"][1]["stages"][0].update(cost=-1.0), "costs less than 0"),
        (lambda c: c["points"][1]["stages"][0].update(cost=1e308), "cost too much to be added up"),
        (lambda c: c["points"][1]["stages"][0].update(model="other"), "model 'other' has no cost"),
        (lambda c: c["points"][1]["stages"][0]["rule"].update(score="guess"), "points.1.stages.0.rule.score"),
        (lambda c: c["points"][1]["stages"][0]["rule"].update(temperature=0.0), "ill-formed rule"),
        (lambda c: c["points"][1]["stages"][1]["rule"].update(weights=[1.0]), "ill-formed rule"),
        (lambda c: c["points"][1]["stages"][1].update(threshold="0.5"), "threshold"),
        (lambda c: c.update(asked=-1), "point -1 of 2"),
        (lambda c: c.update(format=True), "format"),
        (lambda c: c.update(slack=float("nan")), "NaN, which is no finite number"),
        (lambda c: c.update(reference=None), "reference"),
        (lambda c: c.update(note=1), "note"),
        (
            lambda c: c.update(backbone={"name": "resnet18", "options": {}}),
            "lacks its name, its options or its content",
        ),
        (lambda c: c.update({HUGE: HUGE}), "Unexpected"),
        (lambda c: c.update(format=HUGE), "expected format 1"),
        (lambda c: c["costs"]["alone"].update({HUGE: -1.0}), "expected a number above 0"),
        (lambda c: c["costs"].update(shared=[[HUGE, "small", 5.0]]), "share more than one of them costs"),
        (lambda c: c["costs"].update(shared=[["small", "middle", 10.5]]), "share more than one of them costs"),
        (lambda c: c["latency"]["alone"].pop("small"), "share more than one of them costs"),
        (lambda c: c["fitted_on"].append("\ud800"), "surrogates not allowed"),
    ],
)
def test_a_json_of_wrong_types_or_contradictions_is_refused(
    tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    assert message in refused(changed(tmp_path / "cascade.json", change))


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"format":' + b"[" * 100_000,
        b'{"format":1,"format":1}',
        b"\xff\xfe{}",
        b"3",
        b"null",
        b"{}",
        b"",
        b"PK\x03\x04",
        b"PK\x05\x06" + bytes(18),
    ],
)
def test_what_is_neither_json_nor_a_package_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.cascade"
    path.write_bytes(content)
    assert "found neither" in refused(path)
    assert "found neither" in refused(path, CascadeModel.load)


def test_a_threshold_far_below_every_score_has_a_text() -> None:
    for stage in made_cascade().points[1].stages:
        assert "≥" in stage.rule.threshold_text(-1e300)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("package"))


def packed(folder: Path, **classes: list[str]) -> Path:
    """Write a package, whose models may have different class lists."""
    backbone = small_backbone()
    backbone.save(folder / "backbone.safetensors")
    model = patches.attach(backbone, "shared")
    for name in ("small", "middle", "large"):
        preprocessing = {"resolution": 16, "mean": [0.5] * 3, "std": [0.25] * 3}
        patches.save_bundle(
            model, folder / f"{name}.patch", classes=classes.get(name, [*"abcde"]), preprocessing=preprocessing
        )
    save_package(made_cascade(), folder / "whole.cascade", folder)
    return folder / "whole.cascade"


def repacked(package: Path, to: Path, compression: int = zipfile.ZIP_STORED, **more: bytes) -> Path:
    """Write the package's members anew, and more of them."""
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(to, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        for name, data in more.items():
            new.writestr(name, data)
    return to


def test_a_package_that_is_packed_anew_is_whole(package: Path, tmp_path: Path) -> None:
    assert set(CascadeModel.load(repacked(package, tmp_path / "same.cascade")).models) == {"small", "middle", "large"}


def test_a_compressed_package_is_refused(package: Path, tmp_path: Path) -> None:
    path = repacked(package, tmp_path / "small.cascade", zipfile.ZIP_DEFLATED)
    assert "which is compressed or encrypted" in refused(path)


def test_an_encrypted_member_is_refused(package: Path, tmp_path: Path) -> None:
    data = bytearray(package.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "secret.cascade").write_bytes(data)
    assert "which is compressed or encrypted" in refused(tmp_path / "secret.cascade")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_two_members_of_one_name_are_refused(package: Path, tmp_path: Path) -> None:
    path = repacked(package, tmp_path / "double.cascade", **{"cascade.json": b"{}"})
    assert "two members of one name" in refused(path)


def test_the_json_of_a_package_alone_is_no_package(package: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(package) as opened:
        (tmp_path / "cascade.json").write_bytes(opened.read("cascade.json"))
    assert load_cascade(tmp_path / "cascade.json") == made_cascade()
    assert "without its bundles" in refused(tmp_path / "cascade.json", CascadeModel.load)


def test_a_changed_byte_in_any_member_is_found(package: Path, tmp_path: Path) -> None:
    data = package.read_bytes()
    with zipfile.ZipFile(package) as opened:
        places = [data.index(opened.read(member), member.header_offset) + 50 for member in opened.infolist()]
    assert len(places) == 5
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1
        (tmp_path / "changed.cascade").write_bytes(flipped)
        assert "Bad CRC-32" in refused(tmp_path / "changed.cascade", CascadeModel.load)


def test_models_with_different_class_lists_answer_no_question_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CascadeError, match="have different classes"):
        packed(tmp_path, middle=[*"abcdf"])
    with monkeypatch.context() as patched:
        patched.setattr("multitask.cascade.artifact.common_classes", lambda _: None)
        path = packed(tmp_path, middle=[*"abcdf"])
    assert "have different classes" in refused(path, CascadeModel.load)
