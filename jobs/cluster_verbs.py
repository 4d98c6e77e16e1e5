"""`multitask submit` and `multitask jobs`: verbs on a Ray cluster, watched from here."""

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
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

    from jobs.cluster_paths import ClusterPaths


def carry_job(spec: Path, paths: "ClusterPaths") -> tuple[str, bytes]:
    """Name and content of a job spec on the cluster: checked here, with all that its bases say."""
    import yaml

    from jobs.package import ADDED
    from multitask.spec.reading import dump_spec, load_spec

    content = paths.job(dump_spec(load_spec(spec)))
    return f"{ADDED}/{spec.name}", yaml.safe_dump(content, sort_keys=False).encode()


def carry_sweep(spec: Path, paths: "ClusterPaths") -> tuple[str, bytes]:
    """Name and content of a sweep spec on the cluster: checked here, with the job of every trial."""
    import yaml

    from jobs.package import ADDED
    from multitask.spec.reading import dump_spec
    from multitask.sweep.plan import plan_trials
    from multitask.sweep.spec import dump_sweep, load_sweep

    content = dump_sweep(load_sweep(spec))
    content["directory"] = paths.directory(content)
    for plan in plan_trials(load_sweep(content)):
        paths.job(dump_spec(plan.spec))
    return f"{ADDED}/{spec.name}", yaml.safe_dump(paths.sweep(content), sort_keys=False).encode()


Carry = Callable[[Path, "ClusterPaths"], tuple[str, bytes]]
SUBMITTED: Mapping[str, Carry | None] = {
    "train": carry_job,
    "sweep": carry_sweep,
    "evaluate": None,
    "cascade": None,
    "export": None,
}
"""Verbs that can be submitted -> how the `spec` that they read travels."""

jobs_app = typer.Typer(help="Look at, follow and stop the jobs of a Ray cluster.", no_args_is_help=True)

Address = Annotated[
    str | None,
    typer.Option(help="The cluster's dashboard, such as http://127.0.0.1:8265; RAY_ADDRESS or a local one by default."),
]
Job = Annotated[str, typer.Argument(help="The name that `multitask submit` printed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]


def submit(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(help=f"One of {', '.join(SUBMITTED)}, with its own arguments.")],
    storage: Annotated[Path, typer.Option(help="A folder that every node sees at this path; runs go there.")],
    address: Address = None,
    token: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Give the job this environment variable; may be given several times."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the job's name and do not wait for it.")] = False,
    installed: Annotated[
        bool, typer.Option("--installed", help="The nodes' own packages are the pinned ones: install nothing.")
    ] = False,
) -> None:
    """Run another verb on a Ray cluster: with what git tracks here, its pinned packages, and its log shown here."""
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
    print(f"Job {job}; Ctrl-C leaves it running.", file=sys.stderr)
    log = JobLog(client, job, _show)
    try:
        details = follow(client, job, log)
    except KeyboardInterrupt:
        print(f"\nJob {job} goes on: multitask jobs logs {job} --follow, multitask jobs stop {job}", file=sys.stderr)
        raise typer.Exit(130) from None
    _end(job, details, log.end)


@jobs_app.command("list")
def list_jobs(address: Address = None, json_output: AsJson = False) -> None:
    """Show the jobs that were submitted to a cluster, oldest first."""
    rows = [_row(details) for details in connect(address).list_jobs() if details.submission_id is not None]
    rows.sort(key=lambda row: row["started"] or "")
    if json_output:
        print(json.dumps(rows))
        return
    table = Table("job", "status", "started", "version", "command")
    for row in rows:
        table.add_row(*(row[key] or "" for key in ("job", "status", "started", "version", "command")))
    Console().print(table)


@jobs_app.command()
def logs(
    job: Job,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on until the job ends, and end as it does: its exit status.")
    ] = False,
) -> None:
    """Show what a job has printed."""
    from jobs import submission

    client = connect(address)
    if not follow:
        _show(client.get_job_logs(job))
        return
    log = submission.JobLog(client, job, _show)
    _end(job, submission.follow(client, job, log), log.end)


@jobs_app.command()
def stop(job: Job, address: Address = None) -> None:
    """Stop a job: training ends after its step, with a checkpoint."""
    from jobs.submission import PAUSE_S

    client = connect(address)
    stopped = client.stop_job(job)
    while not (details := client.get_job_info(job)).status.is_terminal():
        time.sleep(PAUSE_S)
    print(f"{job}: {details.status}" + ("" if stopped else "; it had ended before"))


def read_status_there(run: Path, address: str) -> dict[str, Any]:
    """What `multitask.run.live.read_status` says on a cluster whose head has the run's directory.

    Raises:
        RunError: nothing was started in this directory.
    """
    from jobs.submission import read_json
    from multitask.run.directory import RunError
    from multitask.run.live import STATUS, judge_status

    status = read_json(connect(address), run / STATUS)
    if status is None:
        raise RunError(f"'{run}' holds no run on the cluster's head. Name STORAGE/NAME as `multitask submit` used it.")
    return judge_status(status)


def connect(address: str | None) -> "JobSubmissionClient":
    """Raises ConnectionError where no cluster answers, and what Ray says of a missing or wrong token."""
    from ray.job_submission import JobSubmissionClient

    if address is not None:
        # What is typed wins: to Ray, the environment matters more than its argument.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
    return JobSubmissionClient(address)


def for_cluster(
    root: Any, verb: str, arguments: list[str], paths: "ClusterPaths"
) -> tuple[list[str], dict[str, bytes]]:
    """A verb's arguments as the cluster needs them, and the files that have to travel with them.

    Args:
        root: the whole command, whose parser says which arguments are paths.
    Raises:
        ValueError: the verb is none that can be submitted.
        PathError, SpecError: a path or a spec that cannot travel.
        The parser's own: an argument that the verb does not have.
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
    """Parameter and value of a verb's arguments that are paths."""
    while hasattr(command, "commands"):
        if not arguments or arguments[0] not in command.commands:
            raise ValueError(f"After '{name}' comes one of {', '.join(command.commands)}.")
        name, *arguments = arguments
        command = command.commands[name]
    values = command.make_context(name, list(arguments)).params
    hints = get_type_hints(command.callback)
    for parameter, value in values.items():
        if value is not None and hints[parameter] in (Path, Path | None):
            yield parameter, Path(value)


def _replaced(word: str, path: Path, new: str) -> str:
    if Path(word) == path:
        return new
    option, _, value = word.partition("=")
    return f"{option}={new}" if option.startswith("--") and value and Path(value) == path else word


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _end(job: str, details: "JobDetails", log_end: str) -> None:
    """Say how a job ended, a failed one with its own error as the last lines, and exit as it did."""
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
    metadata = details.metadata or {}
    started = details.start_time and datetime.fromtimestamp(details.start_time / 1000).astimezone()
    return {
        "job": details.submission_id,
        "status": str(details.status),
        "started": started.isoformat(" ", "seconds") if started else None,
        "version": metadata.get("version"),
        "command": metadata.get("command", details.entrypoint),
    }
