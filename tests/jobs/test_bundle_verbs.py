"""`multitask bundle` as a user sees it: what it prints, and what it refuses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import patches
from tests.jobs.command import multitask
from tests.patches.helpers import images, small_backbone, small_transformer

CLASSES = [f"the rather long name of class {number}" for number in range(5)]


@pytest.fixture
def export(tmp_path: Path) -> Path:
    backbone = small_backbone()
    backbone.save(tmp_path / "backbone.safetensors")
    save(tmp_path / "pets.patch", patches.attach(backbone, "scale_bias+last_layer", 5))
    return tmp_path


def save(path: Path, model: patches.PatchedModel, **changes: Any) -> None:
    patches.save_bundle(
        model,
        path,
        **{
            "classes": CLASSES,
            "preprocessing": {"resolution": 16, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
            "metrics": {"validation_top1": 87.654321, "validation_loss": 0.5},
            **changes,
        },
    )


def test_inspect_shows_a_dozen_lines(export: Path) -> None:
    info = patches.inspect_bundle(export / "pets.patch")
    tensors = patches.load_bundle(export / "pets.patch", small_backbone()).private_state().values()
    values, size_bytes = sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)

    shown = multitask("bundle", "inspect", export / "pets.patch")

    assert shown.returncode == 0, shown.stderr
    path, *lines = shown.stdout.splitlines()
    assert path == str(export / "pets.patch")
    assert len(lines) == 11
    setting = "[[1, 8, 1, 1], [4, 16, 2, 2], [4, 24, 1, 1]]"
    assert {line[:14].strip(): line[15:] for line in lines} == {
        "method": "scale_bias+last_layer",
        "options": 'statistics "batch"',
        "classes": f"5: {CLASSES[0]} and 4 more",
        "head": "private",
        "backbone": f"mobilenet_v2, num_classes 5, inverted_residual_setting {setting}, stem_stride 1, last_channel 32",
        "backbone hash": info.backbone["content_hash"],
        "preprocessing": "resolution 16, mean [0.5, 0.5, 0.5], std [0.25, 0.25, 0.25]",
        "metrics": "validation_top1 87.6543, validation_loss 0.5",
        "tensors": f"{len(tensors)} with {values:,} values, {size_bytes:,} bytes",
        "format": "1",
        "payload hash": info.payload_sha256,
    }
    as_json = multitask("bundle", "inspect", export / "pets.patch", "--json").stdout
    assert json.loads(as_json) == dataclasses.asdict(info)


def test_inspect_lists_the_tensors_if_it_is_asked_to(export: Path) -> None:
    info = patches.inspect_bundle(export / "pets.patch")
    shown = multitask("bundle", "inspect", export / "pets.patch", "--tensors").stdout.splitlines()[12:]
    assert [line.split()[0] for line in shown] == list(info.tensors)
    assert shown[-1].split() == ["classifier.1.bias", "float32", "[5]"]


def test_inspect_shows_names_of_classes_as_they_are_and_obeys_none(export: Path) -> None:
    classes = ["猫", "[red]x[/red]", "$a$", "\x1b[31mred", "short"]
    save(export / "odd.patch", patches.attach(small_backbone(), "scale_bias", 5), classes=classes, metrics={})
    shown = multitask("bundle", "inspect", export / "odd.patch").stdout
    assert "classes        5: 猫, [red]x[/red], $a$, \\x1b[31mred, short\n" in shown
    assert "head           fixed, drawn from seed 0\n" in shown
    assert "metrics        none\n" in shown
    assert "\x1b" not in shown


def test_fold_writes_a_file_that_opens(export: Path) -> None:
    to = export / "plain.safetensors"
    done = multitask("bundle", "fold", export / "pets.patch", "--backbone", export / "backbone.safetensors", to)
    assert done.returncode == 0, done.stderr
    assert f"patches.load_folded('{to}')" in done.stdout
    opened = patches.load_folded(to)
    model = patches.load_bundle(export / "pets.patch", small_backbone())
    with torch.no_grad():
        torch.testing.assert_close(opened.network(images(2, 16)), model(images(2, 16)), rtol=1e-5, atol=1e-5)
    assert list(opened.classes) == CLASSES


def test_fold_refuses_another_ending_and_the_backbones_own_file(export: Path) -> None:
    backbone = export / "backbone.safetensors"
    before = backbone.read_bytes()
    other = multitask("bundle", "fold", export / "missing.patch", "--backbone", backbone, export / "plain.pth")
    assert (other.returncode, "ends in .safetensors" in other.stderr) == (1, True)
    own = multitask("bundle", "fold", export / "pets.patch", "--backbone", backbone, backbone)
    assert (own.returncode, "is the backbone's own file" in own.stderr) == (1, True)
    assert backbone.read_bytes() == before


def test_fold_says_which_method_cannot_be_folded(tmp_path: Path) -> None:
    backbone = small_transformer("small_vit")
    backbone.save(tmp_path / "backbone.safetensors")
    save(tmp_path / "side.patch", patches.attach(backbone, "mist", 5))
    arguments = (tmp_path / "side.patch", "--backbone", tmp_path / "backbone.safetensors", tmp_path / "x.safetensors")
    refused = multitask("bundle", "fold", *arguments)
    assert (refused.returncode, "'mist' cannot be folded" in refused.stderr) == (1, True)
    assert not (tmp_path / "x.safetensors").exists()
