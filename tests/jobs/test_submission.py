"""A job on a cluster is started, followed, and its end is reported."""

import json
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import ClientError
from hypothesis import given
from hypothesis import strategies as st
from ray.job_submission import JobStatus

from jobs import submission
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
