"""The paths of a job that can be used on a cluster, and the errors about those that cannot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.cluster_paths import ClusterPaths, PathError
from multitask.spec.reading import dump_spec, load_spec
from multitask.spec.schema import JobSpec

STORAGE = "/shared/multitask"


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterPaths:
    """Paths of a project with one tracked table; the command runs in its folder."""
    project = tmp_path / "project"
    (project / "data" / "pets" / "train").mkdir(parents=True)
    monkeypatch.chdir(project)
    return ClusterPaths(project, frozenset({"data/pets/train/index.json", "backbone.pth"}), Path(STORAGE))


@pytest.fixture
def content(make_spec: Callable[..., JobSpec]) -> Callable[..., dict[str, Any]]:
    def make(**changes: Any) -> dict[str, Any]:
        spec = dump_spec(make_spec({"pets": {"data": "data/pets"}}, **changes))
        return spec | {"directory": changes.get("directory")}

    return make


def test_a_run_goes_to_the_storage_and_stays_where_it_is_there(paths: ClusterPaths, content: Any) -> None:
    assert paths.job(content())["directory"] == f"{STORAGE}/job"
    assert paths.job(content(directory="runs/mine"))["directory"] == f"{STORAGE}/job"
    assert paths.job(content(directory="/home/me/runs"))["directory"] == f"{STORAGE}/job"
    assert paths.job(content(directory=f"{STORAGE}/../else"))["directory"] == f"{STORAGE}/job"
    assert paths.job(content(directory=f"{STORAGE}/mine"))["directory"] == f"{STORAGE}/mine"


def test_the_job_is_the_same_apart_from_its_paths(paths: ClusterPaths, content: Any) -> None:
    given = content(backbone={"weights": "backbone.pth"})
    found = paths.job(given)
    assert load_spec(found) == load_spec({**given, "directory": f"{STORAGE}/job"})


@pytest.mark.parametrize(
    ("data", "there"),
    [
        ("data/pets", "data/pets"),
        ("../project/data/pets", "data/pets"),
        ("s3://bucket/pets", "s3://bucket/pets"),
        ("/datasets/pets", "/datasets/pets"),
    ],
)
def test_tracked_tables_travel_and_others_are_read_where_they_are(
    paths: ClusterPaths, content: Any, data: str, there: str
) -> None:
    spec = content()
    spec["tasks"][0]["data"] = data
    assert paths.job(spec)["tasks"][0]["data"] == there
    spec["tasks"][0]["data"] = str(Path(data).resolve()) if "://" not in data else data
    assert paths.job(spec)["tasks"][0]["data"] == there


def test_a_table_that_stays_here_is_refused(paths: ClusterPaths, content: Any) -> None:
    spec = content()
    spec["tasks"][0]["data"] = "data/cars"
    with pytest.raises(PathError, match=r"data of task 'pets' is 'data/cars', which git does not track.*s3://"):
        paths.job(spec)


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoints": {"uri": "/home/me/checkpoints"}},
        {"checkpoints": {"uri": "file:///home/me/checkpoints"}},
        {"checkpoints": {"uri": "checkpoints"}},
        {"tracking": {"uri": "sqlite:///runs/mlflow.db"}},
        {"tracking": {"uri": "sqlite:////home/me/mlflow.db"}},
    ],
)
def test_a_local_path_that_the_job_writes_is_refused_with_the_fix(
    paths: ClusterPaths, content: Any, changes: dict[str, Any]
) -> None:
    ((section, values),) = changes.items()
    with pytest.raises(PathError, match=rf"{section}\.uri is '{values['uri']}'.*Name a path in {STORAGE}, or a URI"):
        paths.job(content(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoints": {"uri": "s3://bucket/checkpoints"}},
        {"checkpoints": {"uri": f"{STORAGE}/checkpoints"}},
        {"tracking": {"uri": "https://mlflow.example.org"}},
        {"tracking": {"uri": f"sqlite:///{STORAGE}/mlflow.db"}},
        {"tracking": {"uri": "databricks"}},
    ],
)
def test_what_all_nodes_reach_is_written_as_the_spec_says(
    paths: ClusterPaths, content: Any, changes: dict[str, Any]
) -> None:
    ((section, values),) = changes.items()
    assert paths.job(content(**changes))[section]["uri"] == values["uri"]


def test_stored_features_lie_on_the_nodes_own_disks(paths: ClusterPaths, content: Any) -> None:
    frozen = content(train_shared=False)
    for folder in ("features", str(paths.project / "features")):
        frozen["tasks"][0]["cache_features"] = folder
        with pytest.raises(PathError, match=r"cache_features of task 'pets'.*such as /tmp/features"):
            paths.job(frozen)
    frozen["tasks"][0]["cache_features"] = "/tmp/features"
    assert paths.job(frozen)["tasks"][0]["cache_features"] == "/tmp/features"


def test_a_sweep_travels_as_its_job_does(paths: ClusterPaths, content: Any) -> None:
    job = {key: value for key, value in content().items() if key not in ("name", "directory")}
    sweep = {"name": "rates", "job": job, "space": {"optimizer.rate": {"grid": [0.1, 0.2]}}, "source": "data/pets"}
    assert paths.sweep(sweep) == {**sweep, "directory": f"{STORAGE}/rates"}
    assert paths.sweep({**sweep, "directory": f"{STORAGE}/mine"})["directory"] == f"{STORAGE}/mine"
    with pytest.raises(PathError, match=r"source is 'elsewhere\.yaml'"):
        paths.sweep({**sweep, "source": "elsewhere.yaml"})
    with pytest.raises(PathError, match="data of task 'pets'"):
        paths.sweep({**sweep, "job": {**job, "tasks": [{**job["tasks"][0], "data": "data/cars"}]}})


def test_an_argument_is_tracked_or_in_the_storage(paths: ClusterPaths) -> None:
    assert paths.argument("run", f"{STORAGE}/job") == f"{STORAGE}/job"
    assert paths.argument("run", "data/pets") == "data/pets"
    for elsewhere in ("runs/job", "/home/me/runs/job", f"{STORAGE}-old/job"):
        with pytest.raises(PathError, match=rf"run is '{elsewhere}'.*Name a path in {STORAGE}"):
            paths.argument("run", elsewhere)


@pytest.mark.parametrize("storage", ["runs", "s3://bucket/runs"])
def test_the_storage_is_a_folder_with_an_absolute_path(tmp_path: Path, storage: str) -> None:
    with pytest.raises(PathError, match=r"expected a folder that every node has at the same absolute path"):
        ClusterPaths(tmp_path, frozenset(), Path(storage))
