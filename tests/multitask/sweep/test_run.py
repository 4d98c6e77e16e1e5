"""Errors that a sweep raises before it starts, without Ray."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from multitask.data import DataError
from multitask.run.directory import RunError
from multitask.spec.errors import SpecError
from multitask.spec.reading import dump_spec
from multitask.spec.schema import JobSpec
from multitask.sweep import run_sweep
from patches import BackboneError, PatchError
from tests.conftest import CLASSES, write_named

MakeSpec = Callable[..., JobSpec]


@pytest.fixture
def content(make_spec: MakeSpec, tmp_path: Path) -> dict[str, Any]:
    job = {key: value for key, value in dump_spec(make_spec()).items() if key not in ("name", "directory")}
    return {
        "name": "rates",
        "job": job,
        "space": {"optimizer.rate": {"grid": [0.1]}},
        "directory": str(tmp_path / "rates"),
    }


def test_a_method_that_does_not_fit_the_backbone_is_refused_before_anything_is_written(
    content: dict[str, Any],
) -> None:
    content["space"] = {"tasks.method": {"grid": ["last_layer", "mist"]}}

    with pytest.raises(PatchError, match="mist"):
        run_sweep(content)

    assert not Path(content["directory"]).exists()


def test_missing_data_is_refused_before_anything_is_written(content: dict[str, Any], tmp_path: Path) -> None:
    content["space"] = {"tasks.pets.data": {"grid": [str(tmp_path / "nowhere")]}}

    with pytest.raises(DataError, match="nowhere"):
        run_sweep(content)

    assert not Path(content["directory"]).exists()


def test_missing_test_images_are_refused_before_anything_is_written(content: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(content["job"]["tasks"][0]["data"], data)
    shutil.rmtree(data / "test")
    content["space"] = {"tasks.data": {"grid": [str(data)]}}

    with pytest.raises(DataError, match="test"):
        run_sweep({**content, "test": True})

    assert not Path(content["directory"]).exists()


def test_test_images_of_a_class_that_no_model_knows_are_refused_before_anything_is_written(
    content: dict[str, Any], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(content["job"]["tasks"][0]["data"], data)
    shutil.rmtree(data / "test")
    write_named(data / "test", [*CLASSES, "class x"])
    content["space"] = {"tasks.data": {"grid": [str(data)]}}

    with pytest.raises(DataError, match="test: found 'class x', which the model does not know"):
        run_sweep({**content, "test": True})

    assert not Path(content["directory"]).exists()


def test_workers_of_all_tasks_together_are_refused_because_places_are_counted_before(content: dict[str, Any]) -> None:
    content["job"]["workers"] = 3

    with pytest.raises(SpecError, match="give each task its own"):
        run_sweep(content)

    assert not Path(content["directory"]).exists()


def test_missing_weights_are_refused_before_anything_is_written(content: dict[str, Any], tmp_path: Path) -> None:
    content["space"] = {"backbone.weights": {"grid": [str(tmp_path / "none.safetensors")]}}

    with pytest.raises(BackboneError, match="does not exist"):
        run_sweep(content)

    assert not Path(content["directory"]).exists()


def test_a_source_that_does_not_fit_is_refused_before_it_is_trained(
    content: dict[str, Any], make_spec: MakeSpec, tmp_path: Path
) -> None:
    wider = dump_spec(make_spec())
    wider["backbone"]["options"]["last_channel"] = 32
    (tmp_path / "source.yaml").write_text(yaml.safe_dump(wider))

    with pytest.raises(SpecError, match="does not fit the trials' mobilenet_v2"):
        run_sweep({**content, "source": str(tmp_path / "source.yaml")})

    assert not Path(content["directory"]).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": {"name": "asha", "grace_rounds": 4}}, "grace_rounds is 4, but the trials have 4 steps"),
        (
            {"scheduler": {"name": "asha", "grace_rounds": 1}, "space": {"evaluate_every": {"grid": [4]}}},
            "are evaluated every 4",
        ),
        ({"retrain": True, "space": {"stop_after": {"grid": [2, 3]}}}, "retrain is true and the job has stop_after"),
        ({"space": {"tasks.train_on": {"grid": ["train", "train+validation"]}}}, "a sweep chooses by validation"),
    ],
)
def test_what_could_choose_nothing_is_refused(content: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        run_sweep({**content, **changes})

    assert not Path(content["directory"]).exists()


def test_trials_in_epochs_are_known_in_steps_before_they_start(content: dict[str, Any]) -> None:
    """24 images in batches of 8: epochs of three steps."""
    job = {**content["job"], "steps": None, "evaluate_every": None}
    space = {"epochs": {"grid": [1, 2]}}

    with pytest.raises(SpecError, match="grace_rounds is 6, but the trials have 3 steps and are evaluated every 3"):
        run_sweep({**content, "job": job, "space": space, "scheduler": {"name": "asha", "grace_rounds": 6}})


def test_epochs_that_do_not_fit_a_setting_name_it(content: dict[str, Any]) -> None:
    warm_up = {"name": "cosine", "warm_up_rounds": 5}
    job = {**content["job"], "steps": None, "evaluate_every": None, "schedule": warm_up}

    with pytest.raises(SpecError, match=r"setting epochs=1: .*warm_up_rounds is 5, but the job has 3 steps"):
        run_sweep({**content, "job": job, "space": {"epochs": {"grid": [1, 2]}}})


def test_a_directory_that_is_in_use_is_left_alone(content: dict[str, Any]) -> None:
    folder = Path(content["directory"])
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")

    with pytest.raises(SpecError, match="is not empty"):
        run_sweep(content)
    with pytest.raises(RunError, match="holds no sweep"):
        run_sweep(content, go_on=True)

    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
