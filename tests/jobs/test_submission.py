"""A job on a cluster is started, followed, and its end is reported."""

import json
import os
import shlex
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import ClientError
from hypothesis import given
from hypothesis import strategies as st
from ray.job_submission import JobStatus

from jobs import package, submission
from jobs.package import TOKENS
from jobs.submission import JobLog, exit_status, follow, forwarded, last_words


class BreakingClient:
    """A client that sends a job's log in chunks over a connection that breaks."""

    def __init__(self, chunks: Sequence[str], breaks: Sequence[int]) -> None:
        """Prepare the log.

        Args:
            chunks: the job's log.
            breaks: number of chunks after which each connection breaks; later connections do not break.
        """
        self._chunks, self._breaks = chunks, list(breaks)

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:  # noqa: ARG002
        end = self._breaks.pop(0) if self._breaks else len(self._chunks)
        for chunk in self._chunks[:end]:
            yield chunk
        if end < len(self._chunks):
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, job: str) -> Any:  # noqa: ARG002
        return SimpleNamespace(status=JobStatus.SUCCEEDED)


@given(st.lists(st.text(min_size=1), max_size=6), st.lists(st.integers(0, 6), max_size=2))
def test_a_log_is_shown_once_however_often_its_connection_breaks(chunks: list[str], breaks: list[int]) -> None:
    client: Any = BreakingClient(chunks, breaks)
    shown: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submission, "PAUSE_S", 0)
        details = follow(client, "job", JobLog(client, "job", shown.append))

    assert "".join(shown) == "".join(chunks)
    assert details.status == "SUCCEEDED"


def test_a_job_is_followed_until_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "PAUSE_S", 0)
    statuses = [JobStatus.PENDING, JobStatus.RUNNING, JobStatus.FAILED, JobStatus.STOPPED]

    class Client(BreakingClient):
        def get_job_info(self, job: str) -> Any:  # noqa: ARG002
            return SimpleNamespace(status=statuses.pop(0))

    client: Any = Client(["one\n"], [])
    assert follow(client, "job", JobLog(client, "job", lambda _: None)).status == "FAILED"
    assert statuses == [JobStatus.STOPPED]


def test_a_job_whose_log_is_lost_has_its_outcome_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "PAUSE_S", 0)

    class Client(BreakingClient):
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:  # noqa: ARG002
            raise ClientError("no route")
            yield ""

    client: Any = Client([], [])
    assert follow(client, "job", JobLog(client, "job", lambda _: None)).status == "SUCCEEDED"


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 1, 1),
        (JobStatus.FAILED, 3, 3),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.FAILED, None, 1),
        (JobStatus.FAILED, 0, 1),
        (JobStatus.STOPPED, None, 130),
    ],
)
def test_the_exit_status_is_the_jobs(status: JobStatus, code: int | None, expected: int) -> None:
    details: Any = SimpleNamespace(status=status, driver_exit_code=code)
    assert exit_status(details) == expected


def test_the_last_words_are_the_jobs_own_error() -> None:
    details: Any = SimpleNamespace(message="Job entrypoint command failed with exit code 1")
    error = "error: Worker 'pets/0' of task 'pets' failed: no space\n(--debug shows the traceback)"
    assert last_words(details, f"step 1\nerror: an earlier one\nstep 2\n{error}\n") == error
    assert last_words(details, "step 1\nKilled\n") == details.message


def test_tokens_travel_in_a_file_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    assert forwarded([]) == {}
    (content,) = forwarded(["MLFLOW_TRACKING_TOKEN"]).values()
    assert json.loads(content) == {"MLFLOW_TRACKING_TOKEN": "secret"}
    assert list(forwarded(["MLFLOW_TRACKING_TOKEN"])) == [TOKENS]
    with pytest.raises(ValueError, match="names the environment variable NO_SUCH_TOKEN, which is not set"):
        forwarded(["MLFLOW_TRACKING_TOKEN", "NO_SUCH_TOKEN"])


class OneJob:
    """A client whose one job prints a file, and whose cluster enters a job that was deleted too early as failed."""

    def __init__(self, status: JobStatus, *, breaks: BaseException | None = None) -> None:
        self.calls: list[str] = []
        self._details = SimpleNamespace(status=status, message="Ray's account")
        self._breaks = breaks

    def submit_job(self, entrypoint: str) -> str:
        self.entrypoint = entrypoint
        return "job"

    def get_job_info(self, job: str) -> Any:  # noqa: ARG002
        if self._breaks is not None:
            raise self._breaks
        return self._details

    def get_job_logs(self, job: str) -> str:  # noqa: ARG002
        self.calls.append("logs")
        return '{\n  "state": "running"\n}\n'

    def stop_job(self, job: str) -> bool:  # noqa: ARG002
        self.calls.append("stop")
        return True

    def delete_job(self, job: str) -> bool:
        self.calls.append("delete")
        if self._breaks is not None:
            raise RuntimeError(f"Attempted to delete job '{job}', but it is in a non-terminal state PENDING.")
        return True


def test_a_job_that_read_a_file_is_deleted_when_ray_has_looked_at_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    client: Any = OneJob(JobStatus.SUCCEEDED)
    monkeypatch.setattr("time.sleep", lambda seconds: client.calls.append(f"sleep {seconds:g}"))

    assert submission.read_json(client, Path("/a/status.json")) == {"state": "running"}

    assert client.calls == ["logs", f"sleep {submission.SETTLED_S:g}", "delete"]
    assert submission.SETTLED_S > 3


def test_a_job_that_does_not_start_is_stopped_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submission, "SETTLED_S", 0)
    client: Any = OneJob(JobStatus.PENDING, breaks=KeyboardInterrupt())

    with pytest.raises(KeyboardInterrupt):
        submission.read_json(client, Path("/a/status.json"))

    assert client.calls == ["stop", "delete"]
    assert "Job job stays in the cluster's list of jobs" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["status.json", "a 'run/status.json", "missing"])
def test_the_job_that_reads_a_file_ends_well_where_there_is_none(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name != "missing":
        path.parent.mkdir(exist_ok=True)
        path.write_text('{\n  "state": "running"\n}\n')
    client: Any = OneJob(JobStatus.SUCCEEDED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submission, "SETTLED_S", 0)
        submission.read_json(client, path)

    done = subprocess.run(["sh", "-c", client.entrypoint], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == ({} if name == "missing" else {"state": "running"})


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_a_job_without_an_environment_of_its_own_runs_with_rays_python(tmp_path: Path) -> None:
    python = tmp_path / "ray's" / "bin" / "python3.11"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$0" "$@"\n')
    python.chmod(0o755)
    script = package.PROJECT / "jobs" / "submitted.sh"
    started_with = f"--python_worker_command={python} /ray/setup_worker.py --webui="
    raylet = subprocess.Popen(["sh", "-c", "read line", "raylet", "--port=1", started_with], stdin=subprocess.PIPE)
    try:
        # The supervisor takes the variable out of the environment of what it starts.
        supervisor = f"env -u RAY_RAYLET_PID sh {shlex.quote(str(script))} /shared train 'a job.yaml'; true"
        environment = {"PATH": os.environ["PATH"], "RAY_RAYLET_PID": str(raylet.pid)}
        done = subprocess.run(["sh", "-c", supervisor], env=environment, capture_output=True, text=True)
    finally:
        raylet.communicate()

    assert done.stdout == f"{python} -m jobs.submitted /shared train a job.yaml\n", done.stderr
