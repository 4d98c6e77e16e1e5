"""Jobs on a Ray cluster by Ray's Jobs API: what is sent, how it is watched, how it ended."""

import asyncio
import json
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.package import TOKENS

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

STOP_WAIT_S = 600
"""How long a job that is stopped may take to finish its step and write its checkpoint."""
SETUP_TIMEOUT_S = 1800
"""For installing the pinned packages on a node that has none of them."""
PAUSE_S = 1.0
BROKEN_ENDS = 3
"""Times that the log of a job that has ended may break off before what was shown of it has to do."""
KEPT_CHARS = 100_000
INTERRUPTED = 130


def forwarded(names: Sequence[str]) -> dict[str, bytes]:
    """The file of a package that carries environment variables to the job's driver.

    Ray's own `env_vars` would be written to the logs of every node and shown with the job.

    Raises:
        ValueError: one is not set here.
    """
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise ValueError(f"--token {missing[0]}: no such environment variable here. Set it, or leave the option out.")
    return {TOKENS: json.dumps({name: os.environ[name] for name in names}).encode()} if names else {}


def start(
    client: "JobSubmissionClient",
    package: Path,
    storage: Path,
    command: Sequence[str],
    *,
    version: str,
    requirements: Sequence[str] | None,
) -> str:
    """Upload a package and start what `multitask COMMAND` does, as a job; returns Ray's name for it.

    Args:
        command: verb and arguments, with paths of the cluster.
        version: of the project, shown with the job.
        requirements: lines of a requirements file for every node; None where the nodes have the packages.
    """
    runtime_env: dict[str, Any] = {
        "working_dir": str(package),
        # Ray's stop is then the Ctrl-C on which training ends with a checkpoint.
        "env_vars": {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
        "config": {"setup_timeout_seconds": SETUP_TIMEOUT_S},
    }
    if requirements is not None:
        runtime_env["pip"] = {"packages": list(requirements)}
    return client.submit_job(
        entrypoint=shlex.join(["python", "-m", "jobs.submitted", str(storage), *command]),
        runtime_env=runtime_env,
        metadata={"command": shlex.join(["multitask", *command]), "version": version},
    )


def read_json(client: "JobSubmissionClient", path: Path) -> Any:
    """A JSON file as the cluster's head sees it, read by a job of which nothing stays; None where there is none.

    Args:
        path: of an object, whose first line is an opening brace alone.
    Raises:
        RuntimeError: the job did not run.
    """
    job = client.submit_job(entrypoint=shlex.join(["cat", str(path)]))
    while not (details := client.get_job_info(job)).status.is_terminal():
        time.sleep(PAUSE_S)
    log = client.get_job_logs(job)
    client.delete_job(job)
    if details.status == "SUCCEEDED":
        # Ray writes lines of its own before and behind, the command among them.
        return json.JSONDecoder().raw_decode(log, log.index("{\n"))[0]
    if details.driver_exit_code == 1:
        return None
    raise RuntimeError(f"The cluster could not read {path}: {details.message}")


class JobLog:
    """A job's log, shown as it grows; what was shown stays so when the connection breaks and Ray begins anew."""

    def __init__(self, client: "JobSubmissionClient", job: str, show: Callable[[str], None]) -> None:
        self._client, self._job, self._show = client, job, show
        self._length = 0
        self.end = ""
        """The last part of what was shown."""

    async def read(self) -> None:
        """Show what is new, until the job has ended or the connection breaks."""
        place = 0
        async for chunk in self._client.tail_job_logs(self._job):
            new = chunk[max(0, self._length - place) :]
            place += len(chunk)
            if new:
                self._length += len(new)
                self.end = (self.end + new)[-KEPT_CHARS:]
                self._show(new)


def follow(client: "JobSubmissionClient", job: str, log: JobLog) -> "JobDetails":
    """Show a job's log until the job has ended; returns how."""
    from aiohttp import ClientError

    broken_ends = 0
    while True:
        whole = True
        try:
            asyncio.run(log.read())
        except (ClientError, RuntimeError):
            whole = False
        details = client.get_job_info(job)
        if details.status.is_terminal():
            broken_ends += not whole
            if whole or broken_ends == BROKEN_ENDS:
                return details
        time.sleep(PAUSE_S)


def exit_status(details: "JobDetails") -> int:
    """Of a job that has ended: 0 only if it succeeded, else its driver's, as a shell gives it."""
    if details.status == "SUCCEEDED":
        return 0
    if details.status == "STOPPED":
        return INTERRUPTED
    code = details.driver_exit_code or 1
    return code if code > 0 else 128 - code


def last_words(details: "JobDetails", log_end: str) -> str:
    """Why a job failed: its own error where it printed one, or else what Ray says of its end."""
    lines = log_end.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if errors:
        return "\n".join(lines[errors[-1] :])
    return details.message or "Ray gives no reason. `ray status` and the dashboard may know more."
