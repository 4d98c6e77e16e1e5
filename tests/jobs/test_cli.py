"""The command as a user meets it: exit status, messages, JSON."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from multitask import train
from multitask.spec import JobSpec, dump_spec
from tests.jobs.command import multitask


@pytest.fixture
def spec_file(make_spec: Callable[..., JobSpec], tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(dump_spec(make_spec(steps=2))))
    return path


def test_train_export_inspect_verify_fold(spec_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "job"

    trained = multitask("train", spec_file, "--json")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["engine"] == "local"

    exported = json.loads(multitask("export", run, "--json").stdout)
    assert {Path(name).name for name in exported} == {"backbone.safetensors", "pets.patch", "cars.patch"}
    assert all(Path(name).stat().st_size == size for name, size in exported.items())
    backbone, bundle = run / "export" / "backbone.safetensors", run / "export" / "pets.patch"

    inspected = json.loads(multitask("bundle", "inspect", bundle, "--json").stdout)
    assert (inspected["method"], inspected["num_classes"]) == ("scale_bias+last_layer", 4)
    assert "class 3" in multitask("bundle", "inspect", bundle).stdout

    assert multitask("bundle", "verify", bundle, "--backbone", backbone).returncode == 0
    folded = multitask("bundle", "fold", bundle, "--backbone", backbone, tmp_path / "plain.safetensors")
    assert folded.returncode == 0, folded.stderr
    assert not any("running_mean" in name for name in load_file(tmp_path / "plain.safetensors"))

    evaluated = multitask("evaluate", run, "--task", "pets", "--json")
    assert list(json.loads(evaluated.stdout)) == ["pets"]
    unknown = multitask("evaluate", run, "--task", "pet")
    assert unknown.returncode == 1
    assert "Did you mean 'pets'?" in unknown.stderr

    damaged = bytearray(bundle.read_bytes())
    damaged[-1] ^= 1
    bundle.write_bytes(damaged)
    refused = multitask("bundle", "verify", bundle, "--backbone", backbone)
    assert refused.returncode == 1
    assert "error:" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    "arguments",
    [[], ["train"], ["export"], ["evaluate"], ["demo"], ["bundle"], ["bundle", "fold"], ["data", "import", "paths"]],
)
def test_every_verb_has_help(arguments: list[str]) -> None:
    shown = multitask(*arguments, "--help")

    assert shown.returncode == 0
    assert "Usage" in shown.stdout


def test_a_bad_spec_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("nam: job\n")

    failed = multitask("train", path)

    assert failed.returncode == 1
    assert f"{path}: nam: unknown key; did you mean name?" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "Traceback" in multitask("--debug", "train", path).stderr


def test_a_bundle_of_another_backbone_is_refused(make_spec: Callable[..., JobSpec], tmp_path: Path) -> None:
    export = train(make_spec(steps=1)).export()
    other = load_file(export.backbone)
    other["features.0.0.weight"] += 1
    save_file(other, tmp_path / "other.safetensors")

    refused = multitask("bundle", "verify", export.bundles["pets"], "--backbone", tmp_path / "other.safetensors")

    assert refused.returncode == 1
    assert "expected" in refused.stderr
    assert "found" in refused.stderr
