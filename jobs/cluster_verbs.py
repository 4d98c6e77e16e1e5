"""`multitask submit` and `multitask jobs`: run verbs on a Ray cluster, and watch them from this machine."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.table import Table

from jobs.groups import Group
from jobs.tables import show

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

    from jobs.cluster_paths import ClusterPaths


def carry_job(spec: Path, paths: "ClusterPaths") -> tuple[str, bytes]:
    """Check a job spec, and return its name and content on the cluster, with its base specs merged in."""
    from jobs.package import ADDED
    from multitask.spec.reading import dump_spec, load_spec
    from multitask.spec.text import to_yaml

    content = paths.job(dump_spec(load_spec(spec)))
    return f"{ADDED}/{spec.name}", to_yaml(content).encode()


def carry_sweep(spec: Path, paths: "ClusterPaths") -> tuple[str, bytes]:
    """Check a sweep spec and the job of every trial, and return the spec's name and content on the cluster."""
    from jobs.package import ADDED
    from multitask.spec.reading import dump_spec
    from multitask.spec.text import to_yaml
    from multitask.sweep.plan import plan_trials
    from multitask.sweep.spec import dump_sweep, load_sweep

    content = dump_sweep(load_sweep(spec))
    content["directory"] = paths.directory(content)
    for plan in plan_trials(load_sweep(content)):
        paths.job(dump_spec(plan.spec))
    return f"{ADDED}/{spec.name}", to_yaml(paths.sweep(content)).encode()


Carry = Callable[[Path, "ClusterPaths"], tuple[str, bytes]]
SUBMITTED: Mapping[str, Carry | None] = {
    "train": carry_job,
    "resume": None,
    "attach": None,
    "remove": None,
    "sweep": carry_sweep,
    "evaluate": None,
    "cascade": None,
    "export": None,
}
"""Verb that can be submitted -> the function that prepares its `spec` for the cluster, if it has one."""

jobs_app = typer.Typer(cls=Group, help="List, follow and stop the jobs of a Ray cluster.", no_args_is_help=True)

Address = Annotated[
    str | None,
    typer.Option(
        help="Address of the cluster's dashboard, such as http://127.0.0.1:8265; by default RAY_ADDRESS, or else a "
        "cluster on this machine."
    ),
]
Job = Annotated[str, typer.Argument(help="The name that `multitask submit` printed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]


def submit(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(help=f"One of {', '.join(SUBMITTED)}, followed by its own arguments.")],
    storage: Annotated[
        Path, typer.Option(help="A folder that every node has at this path; run directories are created in it.")
    ],
    address: Address = None,
    token: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Pass this environment variable, such as an access token, to the job; may be given several times.",
        ),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Print the name of the job, and do not wait for its end.")
    ] = False,
    installed: Annotated[
        bool,
        typer.Option("--installed", help="Install no packages, because the nodes already have the pinned versions."),
    ] = False,
) -> None:
    """Run another verb on a Ray cluster.

    The cluster gets the files that git tracks here, and the packages that they pin. The log is shown here.
    """
    from jobs.cluster_paths import ClusterPaths
    from jobs.package import PROJECT, describe_version, pinned_requirements, tracked_files, write_package
    from jobs.submission import JobLog, follow, forwarded, start

    names = tracked_files(PROJECT)
    paths = ClusterPaths(PROJECT, frozenset(names), storage)
    arguments, added = for_cluster(context.find_root().command, verb, context.args, paths)
    added |= forwarded(token or [])
    requirements = None if installed else pinned_requirements(PROJECT)
    version, client = describe_version(PROJECT), connect(address)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "multitask.zip")
        write_package(package, PROJECT, names, added)
        job = start(client, package, storage, [verb, *arguments], version=version, requirements=requirements)
    if detach:
        print(job)
        return
    print(f"Job {job} was submitted. Ctrl-C does not stop it.", file=sys.stderr)
    log = JobLog(client, job, _show)
    try:
        details = follow(client, job, log)
    except KeyboardInterrupt:
        print(
            f"\nJob {job} continues. Follow it with `multitask jobs logs {job} --follow`, or stop it with "
            f"`multitask jobs stop {job}`.",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    _end(job, details, log.end)


@jobs_app.command("list")
def list_jobs(address: Address = None, json_output: AsJson = False) -> None:
    """Show the jobs that were submitted to a cluster, the oldest first."""
    rows = [_row(details) for details in connect(address).list_jobs() if details.submission_id is not None]
    rows.sort(key=lambda row: row["started"] or "")
    if json_output:
        print(json.dumps(rows))
        return
    table = Table("job", "status", "started", "version", "command")
    for row in rows:
        table.add_row(*(row[key] or "" for key in ("job", "status", "started", "version", "command")))
    show(table)


@jobs_app.command()
def logs(
    job: Job,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Continue until the job ends, and exit with its exit status.")
    ] = False,
) -> None:
    """Show the output of a job."""
    from jobs import submission

    client = connect(address)
    if not follow:
        _show(client.get_job_logs(job))
        return
    log = submission.JobLog(client, job, _show)
    _end(job, submission.follow(client, job, log), log.end)


@jobs_app.command()
def stop(job: Job, address: Address = None) -> None:
    """Stop a job; a training finishes its step and writes a checkpoint first."""
    from jobs.submission import PAUSE_S

    client = connect(address)
    stopped = client.stop_job(job)
    while not (details := client.get_job_info(job)).status.is_terminal():
        time.sleep(PAUSE_S)
    print(f"{job}: {details.status}" + ("" if stopped else "; it had ended before"))


def read_status_there(run: Path, address: str) -> dict[str, Any]:
    """Return the status of a run on the head of a cluster, in the form of `multitask.run.live.read_status`.

    Raises:
        RunError: nothing was started in this directory.
    """
    from jobs.submission import read_json
    from multitask.run.directory import RunError
    from multitask.run.live import STATUS, judge_status

    status = read_json(connect(address), run / STATUS)
    if status is None:
        raise RunError(
            f"The cluster's head has no run in '{run}'. Give the run's directory on the cluster: STORAGE/NAME, with "
            "the --storage that `multitask submit` had."
        )
    return judge_status(status, run / STATUS)


def connect(address: str | None) -> "JobSubmissionClient":
    """Connect to a cluster's dashboard.

    Raises:
        ConnectionError: no cluster answers.
        RuntimeError: the token is missing or wrong; the message is Ray's.
    """
    from ray.job_submission import JobSubmissionClient

    if address is not None:
        # Ray prefers this variable to its argument. Set it, so that the address on the command line counts.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
    return JobSubmissionClient(address)


def for_cluster(
    root: Any, verb: str, arguments: list[str], paths: "ClusterPaths"
) -> tuple[list[str], dict[str, bytes]]:
    """Return a verb's arguments as the cluster needs them, and the files that have to be added to the package.

    Args:
        root: the whole `multitask` command; its parser says which arguments are paths.
    Raises:
        ValueError: this verb cannot be submitted.
        PathError, SpecError: a path or a spec cannot be used on the cluster.
        click.ClickException: the verb does not have such an argument.
    """
    if verb not in SUBMITTED:
        raise ValueError(f"'{verb}' cannot be submitted; {', '.join(SUBMITTED)} can.")
    carry = SUBMITTED[verb]
    changed, added = list(arguments), {}
    for name, path in _path_arguments(root.commands[verb], verb, arguments):
        if name == "spec" and carry is not None:
            new, content = carry(path, paths)
            added[new] = content
        else:
            new = paths.argument(name, str(path))
        changed = [_replaced(word, path, new) for word in changed]
    return changed, added


def _path_arguments(command: Any, name: str, arguments: list[str]) -> Iterator[tuple[str, Path]]:
    """Yield name and value of each argument of a verb that is a path."""
    while hasattr(command, "commands"):
        if not arguments or arguments[0] not in command.commands:
            raise ValueError(f"'{name}' must be followed by one of {', '.join(command.commands)}.")
        name, *arguments = arguments
        command = command.commands[name]
    values = command.make_context(name, list(arguments)).params
    hints = get_type_hints(command.callback)
    for parameter, value in values.items():
        if value is not None and hints[parameter] in (Path, Path | None):
            yield parameter, Path(value)


def _replaced(word: str, path: Path, new: str) -> str:
    """Return a word of the command line with `path` replaced by `new`, also in the form --OPTION=PATH."""
    if Path(word) == path:
        return new
    option, _, value = word.partition("=")
    return f"{option}={new}" if option.startswith("--") and value and Path(value) == path else word


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _end(job: str, details: "JobDetails", log_end: str) -> None:
    """Print how a job ended, with its own error if it failed, and exit with its exit status."""
    from jobs.submission import exit_status, last_words

    status = exit_status(details)
    if status == 0:
        print(f"Job {job} succeeded.", file=sys.stderr)
        return
    if details.status == "STOPPED":
        print(f"Job {job} was stopped.", file=sys.stderr)
    else:
        print(f"Job {job} failed with exit status {status}:\n{last_words(details, log_end)}", file=sys.stderr)
    raise typer.Exit(status)


def _row(details: "JobDetails") -> dict[str, str | None]:
    """Return what `multitask jobs list` shows of a job."""
    metadata = details.metadata or {}
    started = details.start_time and datetime.fromtimestamp(details.start_time / 1000).astimezone()
    return {
        "job": details.submission_id,
        "status": str(details.status),
        "started": started.isoformat(" ", "seconds") if started else None,
        "version": metadata.get("version"),
        "command": metadata.get("command", details.entrypoint),
    }
