"""Jobs on a Ray cluster through Ray's Jobs API: start a job, follow its log, and say how it ended."""

import asyncio
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.package import TOKENS
from multitask.startup import SUBMITTED

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

STOP_WAIT_S = 600
"""Time that a stopped job gets to finish its step and write its checkpoint."""
SETUP_TIMEOUT_S = 1800
"""Time that a node without any of the pinned packages gets to install them."""
PAUSE_S = 1.0
"""Time between two looks at a job's status."""
SETTLED_S = 4.0
"""Time after the end of a job in which Ray has looked at it once more: up to three looks, one a second, and a spare."""
BROKEN_ENDS = 3
"""Number of times that the log of an ended job is read again after its connection broke."""
KEPT_CHARS = 100_000
"""Number of characters at the end of a log that are kept, to find the job's error in them."""
INTERRUPTED = 130
"""Exit status of a job that was stopped, as a shell reports Ctrl-C."""


def forwarded(names: Sequence[str]) -> dict[str, bytes]:
    """Return the file (name -> content) that brings environment variables to the job's driver.

    Ray's own `env_vars` are not used, because Ray writes them to the logs of every node and shows them with the job.

    Args:
        names: the environment variables.
    Raises:
        ValueError: a variable is not set on this machine.
    """
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"--token names the environment variable {missing[0]}, which is not set or empty. Set it, or leave the "
            "option out."
        )
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
    """Upload a package and run `multitask COMMAND` as a job.

    Args:
        package: the zip that `write_package` wrote.
        command: a verb and its arguments, with paths as the cluster has them.
        version: version of the project, which is shown with the job.
        requirements: lines of a requirements file for every node, or None if the nodes have the packages already.
    Returns:
        Ray's name for the job.
    """
    runtime_env: dict[str, Any] = {
        "working_dir": str(package),
        "env_vars": {
            # With SIGINT, stopping a job is like Ctrl-C: training ends with a checkpoint.
            "RAY_JOB_STOP_SIGNAL": "SIGINT",
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
            SUBMITTED: "1",
        },
        "config": {"setup_timeout_seconds": SETUP_TIMEOUT_S},
    }
    program = ["sh", "jobs/submitted.sh"]
    if requirements is not None:
        runtime_env["pip"] = {"packages": list(requirements)}
        program = ["python", "-m", "jobs.submitted"]  # of the environment that Ray makes for the job
    return client.submit_job(
        entrypoint=shlex.join([*program, str(storage), *command]),
        runtime_env=runtime_env,
        metadata={"command": shlex.join(["multitask", *command]), "version": version},
    )


def read_json(client: "JobSubmissionClient", path: Path) -> Any:
    """Return the content of a JSON file on the cluster's head, or None if there is no such file.

    A job prints the file and is deleted afterwards, whatever happens.

    Args:
        path: file with a JSON object whose first line is an opening brace alone.
    Raises:
        RuntimeError: the job did not run, or the file cannot be read or is damaged.
    """
    file = shlex.quote(str(path))
    job = client.submit_job(entrypoint=f"if [ -e {file} ]; then cat {file}; else printf '{{\\n}}'; fi")
    try:
        while not (details := client.get_job_info(job)).status.is_terminal():
            time.sleep(PAUSE_S)
        log = client.get_job_logs(job)
    except BaseException:  # Ctrl-C too, where the cluster does not come to run the job
        client.stop_job(job)
        raise
    finally:
        forget(client, job)
    if details.status != "SUCCEEDED":
        raise RuntimeError(f"The cluster could not run the job that reads {path}: {details.message}")
    try:
        # Ray's log also has lines of its own before and after the object.
        return json.JSONDecoder().raw_decode(log, log.index("{\n"))[0] or None
    except ValueError as error:
        raise RuntimeError(f"{path} on the cluster's head is damaged: {error}. Look at the run's log.jsonl.") from error


def forget(client: "JobSubmissionClient", job: str) -> None:
    """Delete a job that has ended from the cluster's list of jobs.

    Ray looks at a job about once a second, and once more some time after its end. A job that it does not find then is
    entered again, as a failed one without a command. So the job is deleted only when Ray has looked.
    """
    time.sleep(SETTLED_S)
    try:
        client.delete_job(job)
    except (RuntimeError, OSError) as error:  # it has not ended, or the cluster is gone
        print(f"Job {job} stays in the cluster's list of jobs: {error}", file=sys.stderr)


class JobLog:
    """Shows a job's log as it grows.

    After a broken connection Ray sends the log again from its start; the part that was shown is then left out.
    """

    def __init__(self, client: "JobSubmissionClient", job: str, show: Callable[[str], None]) -> None:
        self._client, self._job, self._show = client, job, show
        self._length = 0
        self.end = ""
        """End of the log as far as it was shown, at most KEPT_CHARS characters."""

    async def read(self) -> None:
        """Show the new part of the log until the job has ended or the connection breaks."""
        place = 0
        async for chunk in self._client.tail_job_logs(self._job):
            new = chunk[max(0, self._length - place) :]
            place += len(chunk)
            if new:
                self._length += len(new)
                self.end = (self.end + new)[-KEPT_CHARS:]
                self._show(new)


def follow(client: "JobSubmissionClient", job: str, log: JobLog) -> "JobDetails":
    """Show a job's log until the job has ended, and return Ray's account of the job."""
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
    """Return the exit status of an ended job: 0 if it succeeded, else that of its driver as a shell reports it."""
    if details.status == "SUCCEEDED":
        return 0
    if details.status == "STOPPED":
        return INTERRUPTED
    code = details.driver_exit_code or 1
    return code if code > 0 else 128 - code


def last_words(details: "JobDetails", log_end: str) -> str:
    """Return why a job failed: the error that it printed, or else Ray's message about its end."""
    lines = log_end.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if errors:
        return "\n".join(lines[errors[-1] :])
    return details.message or "Ray gives no reason. Look at `ray status` and at the dashboard."
