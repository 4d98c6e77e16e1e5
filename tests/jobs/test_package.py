"""The files of the project that are sent to a cluster, and the limit of their size."""

import os
import re
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.runtime_env.pip import get_uri
from ray.runtime_env import RuntimeEnv

from jobs import package
from jobs.package import (
    LIMIT_BYTES,
    PROJECT,
    PackageError,
    describe_version,
    pinned_requirements,
    tracked_files,
    write_package,
)
from tests.jobs.checkouts import FILES, git, make_checkout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "project")


def test_what_git_tracks_travels_as_it_is_now(project: Path, tmp_path: Path) -> None:
    (project / "jobs" / "demo.yaml").write_text("name: changed\n")
    (project / "constraints.txt").unlink()
    (project / "secret.env").write_text("TOKEN=1\n")
    names = tracked_files(project)
    assert names == sorted(FILES.keys() - {"constraints.txt"})

    write_package(tmp_path / "package.zip", project, names, {"submitted/spec.yaml": b"name: added\n"})

    with ZipFile(tmp_path / "package.zip") as packed:
        assert set(packed.namelist()) == {*names, "submitted/spec.yaml"}
        assert packed.read("jobs/demo.yaml") == b"name: changed\n"
        assert packed.read("submitted/spec.yaml") == b"name: added\n"


def test_equal_content_gives_equal_bytes(project: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{number}.zip" for number in range(3))
    names = tracked_files(project)
    write_package(first, project, names, {})
    os.utime(project / "jobs" / "demo.yaml", (0, 0))
    write_package(second, project, names, {})
    (project / "jobs" / "demo.yaml").write_text("name: other\n")
    write_package(third, project, names, {})

    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != third.read_bytes()


def test_too_large_a_package_is_refused_with_the_arithmetic(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "LIMIT_BYTES", package.MIB)
    (project / "data" / "table" / "large.bin").write_bytes(os.urandom(3 * package.MIB))
    git(project, "add", ".")

    with pytest.raises(PackageError) as refused:
        write_package(tmp_path / "package.zip", project, tracked_files(project), {})

    message = str(refused.value)
    numbers = [float(number) for number in re.findall(r"([\d.]+) MiB", message)]
    assert numbers[:3] == [3.0, 2.0, 1.0], "found, over the limit, limit"
    assert "data 3.0 MiB" in message
    assert "data/table/large.bin 3.0 MiB" in message
    assert "git rm --cached" in message


def test_the_limit_is_that_of_ray_and_the_project_is_within_it(tmp_path: Path) -> None:
    assert LIMIT_BYTES == DASHBOARD_CLIENT_MAX_SIZE
    write_package(tmp_path / "package.zip", PROJECT, tracked_files(PROJECT), {})
    with ZipFile(tmp_path / "package.zip") as packed:
        assert {"constraints.txt", "jobs/specs/demo.yaml", "jobs/data/digits/train/index.json"} < set(packed.namelist())


def test_a_folder_without_git_cannot_be_packed(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"(?s)files that git tracks, but git reports .*Submit from a checkout"):
        tracked_files(tmp_path)


def test_a_version_says_whether_files_differ_from_the_commit(project: Path) -> None:
    clean = describe_version(project)
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (project / "jobs" / "demo.yaml").write_text("name: changed\n")
    assert describe_version(project) == f"{clean}-dirty"


def test_other_constraints_are_another_environment_to_ray(project: Path) -> None:
    def environment() -> str:
        requirements = pinned_requirements(project)
        assert requirements[-2:] == ["one>=1", "two[extra]>=2"]
        return get_uri(RuntimeEnv(pip={"packages": requirements}).to_dict())

    first = environment()
    assert environment() == first
    (project / "constraints.txt").write_text("one==1.6\ntwo==2.5\n")
    assert environment() != first


def test_every_dependency_of_the_project_is_pinned() -> None:
    pins = {line.partition("==")[0].lower() for line in (PROJECT / "constraints.txt").read_text().splitlines()}
    dependencies = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {re.split(r"[\[>=<]", dependency)[0].lower() for dependency in dependencies} <= pins
