"""The paths of a run: absolute in its spec, and followed when its directory is moved."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from multitask.run.directory import Run, RunError, evaluate_models, write_json, write_spec
from multitask.run.paths import absolute, check_data, moved
from multitask.spec.reading import dump_spec
from multitask.spec.schema import JobSpec
from multitask.startup import SUBMITTED

MakeSpec = Callable[..., JobSpec]
FROZEN = {"train_shared": False, "engine": {"name": "local"}}


def paths(spec: JobSpec) -> list[str | None]:
    task = spec.tasks[0]
    return [
        spec.directory,
        spec.checkpoints.uri,
        spec.tracking.uri,
        task.data,
        task.cache_features,
        spec.backbone.weights,
    ]


def relative(make_spec: MakeSpec) -> JobSpec:
    return make_spec(
        {"pets": {"data": "data/pets", "cache_features": "~/cache", "method": "last_layer"}},
        **FROZEN,
        directory="runs/job",
        checkpoints={"uri": "checkpoints"},
        tracking={"uri": "sqlite:///runs/all.db?timeout=5"},
        backbone={"weights": "weights.pth"},
    )


def test_a_run_keeps_absolute_paths(make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    spec = absolute(relative(make_spec))

    assert paths(spec) == [
        f"{tmp_path}/runs/job",
        f"{tmp_path}/checkpoints",
        f"sqlite:///{tmp_path}/runs/all.db?timeout=5",
        f"{tmp_path}/data/pets",
        f"{tmp_path}/home/cache",
        f"{tmp_path}/weights.pth",
    ]
    assert absolute(spec) == spec


def test_what_is_no_local_path_stays(make_spec: MakeSpec, tmp_path: Path) -> None:
    uris: dict[str, Any] = {
        "checkpoints": {"uri": "s3://bucket/checkpoints"},
        "tracking": {"uri": "http://127.0.0.1:5000"},
        "backbone": {"weights": "IMAGENET1K_V2"},
        "directory": str(tmp_path / "runs" / "job"),
    }
    spec = make_spec({"pets": {"data": "s3://bucket/pets"}}, **uris)

    assert absolute(spec) == spec
    assert moved(spec, tmp_path / "other") == make_spec(
        {"pets": {"data": "s3://bucket/pets"}}, **(uris | {"directory": str(tmp_path / "other")})
    )


def test_a_submitted_job_reads_from_its_own_copy_of_the_project(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(SUBMITTED, "1")

    spec = absolute(relative(make_spec))

    assert (spec.tasks[0].data, spec.backbone.weights) == ("data/pets", "weights.pth")
    assert spec.directory == f"{tmp_path}/runs/job"


def test_what_a_moved_run_writes_is_never_at_the_old_place(make_spec: MakeSpec, tmp_path: Path) -> None:
    old, new = tmp_path / "runs" / "job", tmp_path / "other place" / "job"
    (old / "checkpoints").mkdir(parents=True)  # a copy of the run was moved, or somebody trains there anew
    data = tmp_path / "data"
    data.mkdir()
    spec = make_spec(
        {"pets": {"data": str(data), "cache_features": str(old / "cache"), "method": "last_layer"}},
        **FROZEN,
        directory=str(old),
        checkpoints={"uri": str(old / "checkpoints")},
        tracking={"uri": f"sqlite:///{old.parent}/mlflow.db"},
    )

    found = moved(spec, new)

    assert paths(found) == [
        str(new),
        f"{new}/checkpoints",
        f"sqlite:///{new.parent}/mlflow.db",
        str(data),
        f"{new}/cache",
        None,
    ]
    assert moved(found, new) == found


def test_what_lies_beside_the_run_is_kept_or_found_where_it_was_moved_to(make_spec: MakeSpec, tmp_path: Path) -> None:
    project = tmp_path / "project"
    for folder in ("runs/job", "data/pets", "checkpoints"):
        (project / folder).mkdir(parents=True)
    (project / "runs" / "all.db").touch()
    spec = make_spec(
        {"pets": {"data": str(project / "data" / "pets")}},
        directory=str(project / "runs" / "job"),
        checkpoints={"uri": str(project / "checkpoints")},
        tracking={"uri": f"sqlite:///{project}/runs/all.db"},
    )

    # The run alone is moved: everything else is where it was.
    assert paths(moved(spec, tmp_path / "job"))[1:] == paths(spec)[1:]

    shutil.move(project, tmp_path / "renamed")
    found = moved(spec, tmp_path / "renamed" / "runs" / "job")
    assert "/project/" not in str(dump_spec(found))
    assert Path(found.tasks[0].data).is_dir()

    # Data that is nowhere keeps its name, for the error.
    shutil.rmtree(tmp_path / "renamed" / "data")
    assert moved(spec, tmp_path / "renamed" / "runs" / "job").tasks[0].data == spec.tasks[0].data


@pytest.mark.parametrize("directory", [None, "runs/job"])
def test_a_run_of_version_0_1_may_name_its_directory_relatively(
    make_spec: MakeSpec, tmp_path: Path, directory: str | None
) -> None:
    spec = make_spec(directory=directory)
    assert moved(spec, tmp_path) == make_spec(directory=str(tmp_path))


def test_a_finished_run_is_evaluated_where_it_was_moved_to_with_its_data(make_spec: MakeSpec, tmp_path: Path) -> None:
    project = tmp_path / "project"
    data, directory = project / "data" / "pets", project / "runs" / "job"
    spec = make_spec({"pets": {"data": str(data)}}, directory=str(directory))
    write_spec(directory / "spec.yaml", spec)
    version = {"version": 1, "round": 1, "tasks": {}}
    write_json(directory / "result.json", {"last": version, "best": version, "trained_parameters": 9, "seconds": 1.5})
    data.mkdir(parents=True)
    shutil.move(project, tmp_path / "renamed")

    run = Run(tmp_path / "renamed" / "runs" / "job")

    assert run.spec.tasks[0].data == str(tmp_path / "renamed" / "data" / "pets")
    shutil.move(tmp_path / "renamed" / "data", tmp_path / "elsewhere")
    nowhere = Run(run.directory)
    with pytest.raises(RunError, match=rf"'pets' is no longer at '{data}'.*into '{run.directory}/spec.yaml'"):
        evaluate_models({"pets": MagicMock()}, nowhere.spec, "test")
    assert evaluate_models({}, nowhere.spec, "test") == {}
    path = run.directory / "spec.yaml"
    path.write_text(path.read_text().replace(str(data), str(tmp_path / "elsewhere" / "pets")))
    found = Run(run.directory).spec
    check_data(found, found.tasks)
