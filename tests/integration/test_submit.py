"""Jobs from a clean directory, through Ray's Jobs API, on a cluster of three nodes that asks for its token."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from benchmarks.chaos import final_bytes, make_spec, undisturbed, write_tables
from jobs.package import PROJECT
from multitask.data import write_table
from multitask.live import read_status
from multitask.runs import write_spec
from multitask.spec import load_spec
from multitask.tracking import PARENT_TAG
from tests.conftest import png

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@dataclass
class Cluster:
    """A cluster as those who submit to it see it."""

    address: str
    environment: dict[str, str]
    process: "subprocess.Popen[str]"
    logs: Path

    def multitask(self, folder: Path, *arguments: object, **variables: str) -> "subprocess.CompletedProcess[str]":
        """What `multitask ARGUMENTS --address ...` does in a folder."""
        return subprocess.run(
            [sys.executable, "-m", "jobs.cli", *map(str, arguments), "--address", self.address],
            cwd=folder,
            env={**self.environment, "PYTHONPATH": str(PROJECT), **variables},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def replace_a_node(self) -> None:
        """Kill one and start another."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("another", file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "replaced\n"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # A job's command starts with `python`: the one that has Ray.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    nodes = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.three_nodes", str(port)],
        cwd=PROJECT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert nodes.stdout is not None
    logs = nodes.stdout.readline().strip()
    assert logs, "the cluster did not start"
    yield Cluster(f"http://127.0.0.1:{port}", environment, nodes, Path(logs))
    nodes.communicate(timeout=60)


def write_job(folder: Path, **changes: Any) -> Path:
    """A variant of the demo's first way, in a folder that holds nothing else."""
    folder.mkdir()
    path = folder / "job.yaml"
    content = {"base": str(PROJECT / "jobs/specs/demo.yaml"), "name": "job", "resources": {"cpus_per_worker": 1}}
    path.write_text(yaml.safe_dump(content | changes))
    return path


def wait_until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


@pytest.mark.timeout(600)
def test_the_demo_runs_to_its_end_and_its_results_are_in_the_storage(cluster: Cluster, tmp_path: Path) -> None:
    spec, storage = write_job(tmp_path / "clean", steps=100, evaluate_every=50), tmp_path / "storage"
    secret = secrets.token_hex(16)

    options = ("--storage", storage, "--installed", "--token", "A_TOKEN")
    done = cluster.multitask(spec.parent, "submit", "train", "job.yaml", *options, A_TOKEN=secret)

    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads((storage / "job" / "result.json").read_text())
    assert set(result["best"]["tasks"]) == {"fashion", "animals", "digits"}
    assert (storage / "job" / "best.safetensors").is_file()
    assert list(spec.parent.iterdir()) == [spec], "nothing is left where the job came from"

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    runs = client.search_runs([client.get_run(result["mlflow_run_id"]).info.experiment_id])
    assert sorted(run.data.tags.get(PARENT_TAG, "") for run in runs) == ["", *[result["mlflow_run_id"]] * 3]

    logged = [path for path in cluster.logs.rglob("*") if path.is_file()]
    assert logged
    for hidden in (secret, cluster.environment["RAY_AUTH_TOKEN"]):
        assert hidden not in done.stdout + done.stderr
        assert not [path for path in logged if hidden.encode() in path.read_bytes()]

    exported = cluster.multitask(
        spec.parent, "submit", "export", storage / "job", "--storage", storage, "--installed", "--json"
    )
    assert exported.returncode == 0, exported.stderr + exported.stdout
    assert (storage / "job" / "export" / "digits.patch").is_file()


@pytest.mark.timeout(300)
def test_a_failing_job_ends_with_its_workers_own_error(cluster: Cluster, tmp_path: Path) -> None:
    data = tmp_path / "broken"
    for split, image in (("train", b"no picture"), ("validation", png(0, 0))):
        write_table(data / split, ((image, row % 2) for row in range(64)), ["a", "b"])
    task = {"name": "pets", "data": str(data), "num_classes": 2, "batch_size": 8}
    spec = write_job(tmp_path / "clean", tasks=[task])

    failed = cluster.multitask(
        spec.parent, "submit", "train", "job.yaml", "--storage", tmp_path / "storage", "--installed"
    )

    assert failed.returncode == 1
    said = failed.stderr[failed.stderr.index("error: ") :]
    assert "Worker 'pets/0' of task 'pets' failed" in said
    assert "cannot be decoded" in said
    assert said.rstrip() in failed.stdout, "the job's own words"


@pytest.mark.timeout(300)
def test_a_detached_job_is_listed_and_stops_with_a_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    spec, storage = write_job(tmp_path / "clean", steps=100_000, evaluate_every=100_000), tmp_path / "storage"
    started = cluster.multitask(
        spec.parent, "submit", "train", "job.yaml", "--storage", storage, "--installed", "--detach"
    )
    assert started.returncode == 0, started.stderr
    job, run = started.stdout.strip(), storage / "job"
    wait_until(lambda: (run / "status.json").is_file() and read_status(run)["tasks"]["digits"]["made"] > 5)

    listed = json.loads(cluster.multitask(spec.parent, "jobs", "list", "--json").stdout)
    assert [row["status"] for row in listed if row["job"] == job] == ["RUNNING"]
    stopped = cluster.multitask(spec.parent, "jobs", "stop", job)

    assert (stopped.returncode, stopped.stdout) == (0, f"{job}: STOPPED\n")
    assert read_status(run)["state"] == "stopped"
    assert list((run / "checkpoints").iterdir())
    assert "--resume" in cluster.multitask(spec.parent, "jobs", "logs", job).stdout


@pytest.mark.timeout(600)
def test_a_node_that_is_lost_and_replaced_changes_no_bit(cluster: Cluster, tmp_path: Path) -> None:
    write_tables(tmp_path / "data")
    run = tmp_path / "storage" / "run"
    chaos = make_spec(tmp_path / "data", run, {"name": "sync"}, steps=400)
    # Three workers, of which a node has room for two: each node has one, and the new one is needed.
    spec = load_spec(chaos, {"resources": {"cpus_per_worker": 0.8}})
    write_spec(tmp_path / "job.yaml", spec)

    options = ("--storage", run.parent, "--installed", "--detach")
    job = cluster.multitask(tmp_path, "submit", "train", "job.yaml", *options).stdout.strip()
    wait_until(lambda: (run / "status.json").is_file() and read_status(run)["tasks"]["one"]["made"] > 60)
    cluster.replace_a_node()
    ended = cluster.multitask(tmp_path, "jobs", "logs", job, "--follow")

    assert ended.returncode == 0, ended.stdout
    assert len(json.loads((run / "result.json").read_text())["recovery_seconds"]) == 1
    assert final_bytes(run) == undisturbed(spec)


def test_who_has_no_token_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    refused = cluster.multitask(tmp_path, "jobs", "list", RAY_AUTH_TOKEN="another")
    assert refused.returncode == 1
    assert "token" in refused.stderr
