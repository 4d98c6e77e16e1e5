"""The files that start clusters: what Ray and KubeRay say to them, and what the project promises of them."""

import copy
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.kuberay_schema import MANIFESTS

ROOT = Path(__file__).parent.parent
AWS, ON_PREMISE = ROOT / "cluster.yaml", ROOT / "docs" / "cluster" / "on_premise.yaml"
RAY_CLUSTER, RAY_JOB = (ROOT / "docs" / "kubernetes" / name for name in ("raycluster.yaml", "rayjob.yaml"))
Change = Callable[[dict[str, Any]], Any]


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of a cluster file before it starts anything."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def pinned(name: str) -> str:
    found = re.search(rf"^{name}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("path", [AWS, ON_PREMISE], ids=lambda path: path.name)
def test_ray_accepts_the_cluster_file(path: Path) -> None:
    prepared = checked(read(path))
    assert prepared["max_workers"] >= sum(kind["min_workers"] for kind in prepared["available_node_types"].values())


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (AWS, lambda config: config.update(max_worker=3)),
        (AWS, lambda config: config.update(head_node_type="heads")),
        (AWS, lambda config: config["available_node_types"]["gpu_worker"].pop("node_config")),
        (AWS, lambda config: config["available_node_types"]["gpu_worker"].update(min_workers=13)),
        (AWS, lambda config: config["auth"].update(ssh_usr="ubuntu")),
        (AWS, lambda config: config.update(setup_commands=[{"run": "pip install ."}])),
        (ON_PREMISE, lambda config: config["provider"].pop("head_ip")),
        (ON_PREMISE, lambda config: config.update(worker_ips=["10.0.0.2"])),
    ],
)
def test_ray_refuses_a_broken_copy(path: Path, change: Change) -> None:
    broken = read(path)
    change(broken)
    with pytest.raises((jsonschema.ValidationError, ValueError, click.ClickException)):
        checked(broken)


@pytest.mark.parametrize("path", [AWS, ON_PREMISE], ids=lambda path: path.name)
def test_every_node_starts_with_the_token_and_a_bounded_object_store_that_frees_at_once(path: Path) -> None:
    config = read(path)
    assert "~/.ray/auth_token" in config["file_mounts"].values()
    starts = [
        [command for command in config[key] if "ray start" in command]
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
    ]
    assert [len(commands) for commands in starts] == [1, 1]
    for (command,) in starts:
        assert "RAY_AUTH_MODE=token RAY_free_objects_batch_size=1 ray start" in command
        assert re.search(r"--object-store-memory=\d+(\s|$)", command)
    assert "--dashboard-host=127.0.0.1" in starts[0][0]


def image_sources() -> set[str]:
    """What the image is built of."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    return {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}


@pytest.mark.parametrize("path", [AWS, ON_PREMISE], ids=lambda path: path.name)
def test_the_project_is_installed_at_its_pinned_versions(path: Path) -> None:
    config = read(path)
    assert set(config["file_mounts"].values()) == image_sources() | {"~/.ray/auth_token"}
    installs = [
        re.search(r"pip install .*--constraint (\S+)/constraints.txt (\S+)$", c) for c in config["setup_commands"]
    ]
    assert [found[1] == found[2] for found in installs if found] == [True]


def test_only_workers_are_interrupted_and_the_cluster_is_limited() -> None:
    config = read(AWS)
    kinds = config["available_node_types"]
    head = kinds.pop(config["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]
    assert {kind["node_config"]["InstanceMarketOptions"]["MarketType"] for kind in kinds.values()} == {"spot"}
    assert {"GPU" in kind["resources"] for kind in kinds.values()} == {True, False}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] <= config["max_workers"] for kind in kinds.values())


def test_images_and_manifests_have_the_pinned_ray() -> None:
    config = read(AWS)
    images = [config["docker"]["image"], config["available_node_types"]["gpu_worker"]["docker"]["worker_image"]]
    assert all(image.startswith(f"rayproject/ray:{pinned('ray')}-py311-") for image in images)
    assert read(RAY_CLUSTER)["spec"]["rayVersion"] == pinned("ray")


@pytest.mark.parametrize("path", [RAY_CLUSTER, RAY_JOB], ids=lambda path: path.name)
def test_a_manifest_has_only_fields_that_kuberay_knows(path: Path) -> None:
    manifest = read(path)
    jsonschema.validate(manifest, MANIFESTS[manifest["kind"]])


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.update(autoscaling=True),
        lambda spec: spec["authOptions"].update(mode="tokens"),
        lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda spec: spec["workerGroupSpecs"][0].pop("groupName"),
        lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].pop("image"),
        lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"].update(limit={}),
    ],
)
def test_a_broken_manifest_is_refused(change: Change) -> None:
    manifest = read(RAY_CLUSTER)
    change(manifest["spec"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, MANIFESTS["RayCluster"])


def test_a_job_on_kubernetes_gets_the_cluster_of_the_other_manifest() -> None:
    cluster, job = read(RAY_CLUSTER)["spec"], read(RAY_JOB)["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    # KubeRay sends the job from another pod, so there the dashboard has to be reached from outside its own.
    assert cluster["headGroupSpec"]["rayStartParams"].pop("dashboard-host") == "127.0.0.1"
    assert job["headGroupSpec"]["rayStartParams"].pop("dashboard-host") == "0.0.0.0"
    assert job == cluster


def test_every_pod_has_the_shared_folder_and_a_bounded_object_store() -> None:
    spec = read(RAY_CLUSTER)["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert int(group["rayStartParams"]["object-store-memory"]) > 0
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]


def test_the_image_is_built_of_files_that_are_there_from_the_pinned_packages() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    sent = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    assert image_sources() == sent
    assert all((ROOT / name).exists() for name in sent)
    assert any("pip install" in line and "--constraint constraints.txt" in line for line in lines)

    (base,) = [line.removeprefix("FROM ") for line in lines if line.startswith("FROM ")]
    least = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert base.startswith(f"python:{least.removeprefix('>=')}-")
