"""`multitask submit` and `multitask jobs` with a client that only pretends to have a cluster."""

import json
import shlex
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import pytest
import yaml
from ray.job_submission import JobStatus

from jobs import cluster_verbs, package, submission
from multitask.spec.reading import dump_spec, load_spec
from multitask.spec.schema import JobSpec
from multitask.startup import SUBMITTED
from multitask.sweep.spec import load_sweep
from tests.jobs.checkouts import make_checkout
from tests.jobs.command import multitask

ERROR = "error: Worker 'pets/0' of task 'pets' failed: no space\n(--debug shows the traceback)\n"


@dataclass
class Cluster:
    """A client that records what a cluster is told, and gives prepared answers."""

    status: JobStatus = JobStatus.SUCCEEDED
    exit_code: int | None = 0
    log: str = "step 1\n"
    told: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)

    def submit_job(self, **told: Any) -> str:
        self.told = told
        if "runtime_env" not in told:
            return "raysubmit_1"
        with ZipFile(told["runtime_env"]["working_dir"]) as packed:
            self.files = {name: packed.read(name) for name in packed.namelist()}
        return "raysubmit_1"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        assert job == "raysubmit_1"
        yield self.log

    def get_job_logs(self, job: str) -> str:
        assert job == "raysubmit_1"
        return self.log

    def get_job_info(self, job: str) -> Any:
        assert job == "raysubmit_1"
        return SimpleNamespace(status=self.status, driver_exit_code=self.exit_code, message="Ray's account")

    def stop_job(self, job: str) -> bool:
        self.stopped.append(job)
        return True

    def delete_job(self, job: str) -> bool:
        self.deleted.append(job)
        return True

    def list_jobs(self) -> list[Any]:
        common: dict[str, Any] = {"status": JobStatus.RUNNING, "entrypoint": "python", "start_time": 1_700_000_000_000}
        ours = {"command": "multitask train submitted/demo.yaml", "version": "0123456789ab"}
        return [
            SimpleNamespace(submission_id="raysubmit_1", metadata=ours, **common),
            SimpleNamespace(submission_id=None, metadata=None, **common),
        ]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    invented = Cluster()
    monkeypatch.setattr(cluster_verbs, "connect", lambda _: invented)
    monkeypatch.setattr(package, "PROJECT", make_checkout(tmp_path / "project"))
    monkeypatch.setattr(submission, "PAUSE_S", 0)
    return invented


@pytest.fixture
def spec_file(make_spec: Callable[..., JobSpec], tmp_path: Path) -> Path:
    """A job spec outside the project."""
    path = tmp_path / "clean" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(dump_spec(make_spec())))
    return path


def test_a_job_is_sent_with_the_project_its_pins_and_its_spec(
    cluster: Cluster, spec_file: Path, make_spec: Callable[..., JobSpec], tmp_path: Path
) -> None:
    done = multitask("submit", "train", spec_file, "--overwrite", "--storage", "/shared")

    assert done.returncode == 0, done.stderr
    assert done.stdout == "step 1\n"
    words = shlex.split(cluster.told["entrypoint"])
    assert words == ["python", "-m", "jobs.submitted", "/shared", "train", "submitted/mine.yaml", "--overwrite"]
    assert {"jobs/demo.yaml", "constraints.txt", "submitted/mine.yaml"} < set(cluster.files)

    (tmp_path / "there.yaml").write_bytes(cluster.files["submitted/mine.yaml"])
    assert load_spec(tmp_path / "there.yaml") == make_spec(directory="/shared/job")

    environment = cluster.told["runtime_env"]
    assert "one>=1" in environment["pip"]["packages"]
    assert environment["env_vars"]["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert environment["env_vars"][SUBMITTED] == "1"
    assert cluster.told["metadata"]["command"] == "multitask train submitted/mine.yaml --overwrite"


def test_a_sweep_is_sent_with_its_job_and_writes_to_the_storage(
    cluster: Cluster, make_spec: Callable[..., JobSpec], tmp_path: Path
) -> None:
    job = {key: value for key, value in dump_spec(make_spec()).items() if key not in ("name", "directory")}
    sweep = {"name": "rates", "job": job, "space": {"optimizer.rate": {"grid": [0.01, 0.1]}}}
    (tmp_path / "rates.yaml").write_text(yaml.safe_dump(sweep))

    done = multitask("submit", "sweep", tmp_path / "rates.yaml", "--resume", "--storage", "/shared")

    assert done.returncode == 0, done.stderr
    assert shlex.split(cluster.told["entrypoint"])[4:] == ["sweep", "submitted/rates.yaml", "--resume"]
    (tmp_path / "there.yaml").write_bytes(cluster.files["submitted/rates.yaml"])
    assert load_sweep(tmp_path / "there.yaml") == load_sweep({**sweep, "directory": "/shared/rates"})


def test_a_trial_whose_data_stays_here_is_refused(
    cluster: Cluster, make_spec: Callable[..., JobSpec], tmp_path: Path
) -> None:
    job = {key: value for key, value in dump_spec(make_spec()).items() if key not in ("name", "directory")}
    space = {"tasks.data": {"grid": ["s3://bucket/pets", "pets"]}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"name": "data", "job": job, "space": space}))
    refused = multitask("submit", "sweep", tmp_path / "data.yaml", "--storage", "/shared")
    assert (refused.returncode, cluster.told) == (1, {})
    assert "is 'pets', which git does not track" in refused.stderr


@pytest.mark.parametrize("arguments", [["submit"], ["jobs"], ["jobs", "list"], ["jobs", "logs"], ["jobs", "stop"]])
def test_the_verbs_have_help(arguments: list[str]) -> None:
    shown = multitask(*arguments, "--help")
    assert shown.returncode == 0
    assert "Usage" in shown.stdout


def test_nothing_is_installed_on_nodes_that_have_it_all(cluster: Cluster, spec_file: Path) -> None:
    assert multitask("submit", "train", spec_file, "--storage", "/shared", "--installed").returncode == 0
    assert "pip" not in cluster.told["runtime_env"]


def test_a_failed_job_ends_as_it_did_with_its_own_error_last(cluster: Cluster, spec_file: Path) -> None:
    cluster.status, cluster.exit_code, cluster.log = JobStatus.FAILED, 3, f"step 1\n{ERROR}"
    failed = multitask("submit", "train", spec_file, "--storage", "/shared")
    assert failed.returncode == 3
    assert failed.stderr.endswith(ERROR)
    assert failed.stdout.endswith(ERROR)


def test_a_stopped_job_is_no_success(cluster: Cluster, spec_file: Path) -> None:
    cluster.status, cluster.exit_code = JobStatus.STOPPED, None
    stopped = multitask("submit", "train", spec_file, "--storage", "/shared")
    assert (stopped.returncode, "was stopped" in stopped.stderr) == (130, True)


def test_a_detached_job_is_named_and_not_waited_for(cluster: Cluster, spec_file: Path) -> None:
    cluster.status = JobStatus.FAILED
    detached = multitask("submit", "train", spec_file, "--storage", "/shared", "--detach")
    assert (detached.returncode, detached.stdout) == (0, "raysubmit_1\n")


def test_a_token_is_in_its_file_alone(cluster: Cluster, spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hush-hush")
    done = multitask("submit", "train", spec_file, "--storage", "/shared", "--token", "MLFLOW_TRACKING_TOKEN")
    assert done.returncode == 0, done.stderr
    assert [name for name, content in cluster.files.items() if b"hush-hush" in content] == [package.TOKENS]
    assert "hush-hush" not in json.dumps(cluster.told) + done.stdout + done.stderr


def test_other_verbs_work_on_the_storage(cluster: Cluster) -> None:
    for arguments in (
        ["export", "/shared/job", "--version", "last"],
        ["evaluate", "/shared/job", "--save-predictions=/shared/predictions", "--split", "test"],
        ["cascade", "fit", "/shared/predictions", "--to", "/shared/pets.json", "--cost-table=/shared/costs.csv"],
        ["train", "--resume", "/shared/job"],
        ["resume", "/shared/job"],
        ["attach", "/shared/job", "/shared/food.yaml"],
        ["remove", "/shared/job", "cars"],
    ):
        done = multitask("submit", *arguments, "--storage", "/shared")
        assert done.returncode == 0, done.stderr
        assert shlex.split(cluster.told["entrypoint"])[4:] == arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "runs/job"], "run is 'runs/job'"),
        (["evaluate", "/shared/job", "--save-predictions=predictions"], "save_predictions is 'predictions'"),
        (["cascade", "run", "/shared/a.cascade", "s3://bucket/pets", "--to", "/tmp/a.parquet"], "to is '/tmp/a.parq"),
        (["demo"], "'demo' cannot be submitted; train, resume, attach, remove, sweep, evaluate, cascade, export can."),
        (["cascade", "fitt"], "'cascade' must be followed by one of fit, evaluate, run, plot."),
        (["export", "/shared/job", "--versoin", "last"], "No such option: --versoin"),
        (["export", "/shared/job", "--version", "newest"], "newest"),
        (["export"], "Missing argument"),
    ],
)
def test_what_cannot_run_there_is_refused_before_anything_is_sent(
    cluster: Cluster, arguments: list[str], message: str
) -> None:
    refused = multitask("submit", *arguments, "--storage", "/shared")
    assert refused.returncode != 0
    assert message in refused.stderr
    assert not cluster.told


def test_a_spec_that_writes_to_this_machine_is_refused_with_the_fix(
    cluster: Cluster, make_spec: Callable[..., JobSpec], spec_file: Path
) -> None:
    local = make_spec(checkpoints={"uri": "/home/me/checkpoints"})
    spec_file.write_text(yaml.safe_dump(dump_spec(local)))
    refused = multitask("submit", "train", spec_file, "--storage", "/shared")
    assert refused.returncode == 1
    assert "checkpoints.uri is '/home/me/checkpoints'" in refused.stderr
    assert "Name a path in /shared, or a URI" in refused.stderr
    assert not cluster.told


def test_a_bad_spec_is_refused_before_anything_is_sent(cluster: Cluster, spec_file: Path) -> None:
    spec_file.write_text("nam: job\n")
    refused = multitask("submit", "train", spec_file, "--storage", "/shared")
    assert refused.returncode == 1
    assert "nam: unknown key; did you mean name?" in refused.stderr
    assert not cluster.told


@pytest.mark.usefixtures("cluster")
def test_jobs_are_listed_without_what_ray_runs_itself() -> None:
    (row,) = json.loads(multitask("jobs", "list", "--json").stdout)
    assert row["job"] == "raysubmit_1"
    assert row["status"] == "RUNNING"
    assert row["command"] == "multitask train submitted/demo.yaml"
    assert row["version"] == "0123456789ab"
    assert "raysubmit_1" in multitask("jobs", "list").stdout


def test_logs_are_shown_and_followed_to_the_end(cluster: Cluster) -> None:
    cluster.status, cluster.exit_code, cluster.log = JobStatus.FAILED, 1, ERROR
    shown = multitask("jobs", "logs", "raysubmit_1")
    assert (shown.returncode, shown.stdout) == (0, ERROR)
    followed = multitask("jobs", "logs", "raysubmit_1", "--follow")
    assert (followed.returncode, followed.stdout) == (1, ERROR)


def test_a_job_is_stopped(cluster: Cluster) -> None:
    cluster.status = JobStatus.STOPPED
    done = multitask("jobs", "stop", "raysubmit_1")
    assert (done.returncode, done.stdout) == (0, "raysubmit_1: STOPPED\n")
    assert cluster.stopped == ["raysubmit_1"]


def test_no_cluster_is_an_error_that_names_the_address(spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:2")
    failed = multitask("submit", "train", spec_file, "--storage", "/shared", "--address", "http://127.0.0.1:1")
    assert failed.returncode == 1
    assert "http://127.0.0.1:1" in failed.stderr


def test_a_runs_status_is_read_there_by_a_job_of_which_nothing_stays(cluster: Cluster) -> None:
    where = {"process": 1, "host": "another", "updated": time.time() - 5}
    status = {"name": "run", "state": "running", "engine": "async", "error": None, "tasks": {}, **where}
    # Ray and the job write to one file, so Ray's lines come before those of the job, and also after them.
    around = ("Runtime env is setting up.\n", "Running entrypoint for job raysubmit_1: cat\n{'an': 'event'}\n")
    cluster.log = json.dumps(status, indent=2).join(around)

    shown = multitask("status", "/shared/a run", "--address", "http://head:8265", "--json")

    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert (found["state"], found["engine"]) == ("running", "async")
    assert 5 <= found["silent_s"] < 60
    assert cluster.told == {"entrypoint": "cat '/shared/a run/status.json'"}
    assert cluster.deleted == ["raysubmit_1"]


@pytest.mark.parametrize(("exit_code", "said"), [(1, "The cluster's head has no run in"), (None, "Ray's account")])
def test_a_status_that_cannot_be_read_there_is_an_error(cluster: Cluster, exit_code: int | None, said: str) -> None:
    cluster.status, cluster.exit_code = JobStatus.FAILED, exit_code
    shown = multitask("status", "/shared/run", "--address", "http://head:8265")
    assert shown.returncode == 1
    assert said in shown.stderr
    assert cluster.deleted == ["raysubmit_1"]
