"""Jobs from a clean directory, through Ray's Jobs API, on a cluster of three nodes that asks for its token."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml
from mlflow import MlflowClient

from benchmarks.chaos import make_spec, write_tables
from jobs.package import PROJECT
from multitask.data import write_table
from multitask.run.directory import write_spec
from multitask.run.live import read_status
from multitask.run.mlflow_store import PARENT_TAG
from multitask.spec.reading import load_spec
from multitask.spec.schema import JobSpec
from tests.conftest import png, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]
START_S = 480
"""Until a submitted job makes steps: a driver and three workers import torch, beside another test's processes."""
MEASURED = {
    "ray_multitask_pushes_total",
    "ray_multitask_images_total",
    "ray_multitask_pushed_bytes_total",
    "ray_multitask_staleness",
    "ray_multitask_queue",
    "ray_multitask_step_seconds_bucket",
}
"""Metrics that docs/cluster.md names, apart from those that count what goes wrong."""


@dataclass
class Cluster:
    """A cluster as those who submit to it see it."""

    address: str
    environment: dict[str, str]
    session: Path
    """Folder of its logs, among other things."""

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

    def submit(self, spec: Path, storage: Path, *options: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Submit a training job from its spec's folder; the nodes have the packages."""
        where = ("--storage", storage, "--installed", *options)
        return self.multitask(spec.parent, "submit", "train", spec.name, *where, **variables)

    def measured(self) -> set[str]:
        """Names of the metrics that Prometheus would find."""
        discovered = json.loads((self.session / "prom_metrics_service_discovery.json").read_text())
        pages = []
        for target in discovered[0]["targets"]:
            with contextlib.suppress(OSError), urlopen(f"http://{target}/metrics", timeout=30) as page:
                pages.append(page.read().decode())
        return {line.partition("{")[0] for page in pages for line in page.splitlines()}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # A job has to find Ray's own Python without it.
    ours = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join(path for path in environment["PATH"].split(os.pathsep) if path != ours)
    # In Ray's usual folder a job would find the address of the cluster that was started last on this machine. A short
    # path, as those of sockets in it have at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        nodes = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.three_nodes", str(port)],
            cwd=PROJECT,
            env={**environment, "RAY_TMPDIR": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert nodes.stdout is not None
        session = nodes.stdout.readline().strip()
        assert session, "the cluster did not start"
        yield Cluster(f"http://127.0.0.1:{port}", environment, Path(session))
        # All processes of the cluster at once: in good order it would take half a minute.
        os.killpg(nodes.pid, signal.SIGKILL)
        nodes.wait()


def write_job(folder: Path, **changes: Any) -> Path:
    """A variant of the demo's first way, in a folder that holds nothing else."""
    folder.mkdir()
    path = folder / "job.yaml"
    content = {"base": str(PROJECT / "jobs/specs/demo.yaml"), "name": "job", "resources": {"cpus_per_worker": 1}}
    path.write_text(yaml.safe_dump(content | changes))
    return path


def write_chaos(folder: Path, run: Path, engine: str, steps: int, **changes: Any) -> JobSpec:
    """A job of three small workers, with its tables beside it."""
    write_tables(folder / "data")
    spec = load_spec(make_spec(folder / "data", run, {"name": engine}, steps), changes)
    write_spec(folder / "job.yaml", spec)
    return spec


def steps_made(run: Path) -> int:
    return read_status(run)["tasks"]["one"]["made"] if (run / "status.json").is_file() else 0


def test_the_demo_runs_to_its_end_and_its_results_are_in_the_storage(cluster: Cluster, tmp_path: Path) -> None:
    few = {"batch_size": 8, "validation_images": 60}
    spec = write_job(tmp_path / "clean", steps=10, evaluate_every=10, task_defaults=few)
    storage = tmp_path / "storage"
    secret = secrets.token_hex(16)

    done = cluster.submit(spec, storage, "--token", "A_TOKEN", A_TOKEN=secret)

    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads((storage / "job" / "result.json").read_text())
    assert set(result["best"]["tasks"]) == {"fashion", "animals", "digits"}
    assert (storage / "job" / "best.safetensors").is_file()
    assert list(spec.parent.iterdir()) == [spec], "nothing is left where the job came from"

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    runs = client.search_runs([client.get_run(result["mlflow_run_id"]).info.experiment_id])
    assert sorted(run.data.tags.get(PARENT_TAG, "") for run in runs) == ["", *[result["mlflow_run_id"]] * 3]

    logged = [path for path in (cluster.session / "logs").rglob("*") if path.is_file()]
    assert logged
    for hidden in (secret, cluster.environment["RAY_AUTH_TOKEN"]):
        assert hidden not in done.stdout + done.stderr
        assert not [path for path in logged if hidden.encode() in path.read_bytes()]


def test_a_failing_job_ends_with_its_workers_own_error(cluster: Cluster, tmp_path: Path) -> None:
    data = tmp_path / "broken"
    for split, image in (("train", b"no picture"), ("validation", png(0, 0))):
        write_table(data / split, ((image, row % 2) for row in range(64)), ["a", "b"])
    task = {"name": "pets", "data": str(data), "num_classes": 2, "batch_size": 8}
    spec = write_job(tmp_path / "clean", tasks=[task])

    failed = cluster.submit(spec, tmp_path / "storage")

    assert failed.returncode == 1
    said = failed.stderr[failed.stderr.index("error: ") :]
    assert "Worker 'pets/0' of task 'pets' failed" in said
    assert "cannot be decoded" in said
    assert said.rstrip() in failed.stdout, "the job's own words"


def test_a_detached_job_is_listed_and_measured_and_stops_with_a_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "storage" / "run"
    spec = write_chaos(tmp_path, run, "async", steps=100_000, checkpoints={"every_rounds": None})
    started = cluster.submit(tmp_path / "job.yaml", run.parent, "--detach")
    assert started.returncode == 0, started.stderr
    job = started.stdout.strip()
    wait_until(lambda: steps_made(run) > 5, START_S)

    listed = json.loads(cluster.multitask(tmp_path, "jobs", "list", "--json").stdout)
    assert [row["status"] for row in listed if row["job"] == job] == ["RUNNING"]
    standing = json.loads(cluster.multitask(tmp_path, "status", run, "--json").stdout)
    assert standing["state"] == "running"
    assert standing["tasks"]["one"]["made"] > 5
    wait_until(lambda: cluster.measured() >= MEASURED)
    stopped = cluster.multitask(tmp_path, "jobs", "stop", job)

    assert (stopped.returncode, stopped.stdout) == (0, f"{job}: STOPPED\n")
    assert read_status(run)["state"] == "stopped"
    (checkpoint,) = Path(spec.checkpoint_folder).iterdir()
    assert str(checkpoint) in cluster.multitask(tmp_path, "jobs", "logs", job).stdout


def test_who_has_no_token_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    rejected = cluster.multitask(tmp_path, "jobs", "list", RAY_AUTH_TOKEN="another")
    assert rejected.returncode == 1
    assert "token" in rejected.stderr
