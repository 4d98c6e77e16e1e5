"""The paths in the spec of a run: absolute when the run starts, and followed when its directory is moved."""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from multitask.errors import RunError
from multitask.run.mlflow_store import resolve
from multitask.spec.schema import JobSpec, TaskSpec
from multitask.startup import SUBMITTED
from patches.weights import FILE_TYPES

Change = Callable[[Path], Path]


def absolute(spec: JobSpec) -> JobSpec:
    """Return a job spec whose paths are absolute, so that the run can go on from any working directory.

    In a job that was submitted to a cluster, paths that are read stay relative, because the working directory is a
    copy of the project that is removed with the job, and a resumed job has a copy of its own.
    """

    def writes(path: Path) -> Path:
        return Path(os.path.abspath(path.expanduser()))

    def reads(path: Path) -> Path:
        return path if SUBMITTED in os.environ else writes(path)

    return _changed(spec, writes(spec.run_directory).resolve(), reads, writes)


def moved(spec: JobSpec, directory: Path) -> JobSpec:
    """Return the spec of a run for the directory in which the run is now.

    A path in the old run directory is replaced by the same path in the new one. Any other path is kept if it still
    exists. If it does not, the path with the same position relative to the new directory takes its place: always for
    what the run writes, so that nothing is written to the old place, and otherwise if it exists.

    Args:
        directory: the absolute path of the run directory.
    """
    old = Path(spec.directory or "")
    if not old.is_absolute() or old == directory:
        return replace(spec, directory=str(directory))

    def follow(path: Path) -> Path:
        there = Path(os.path.normpath(directory / os.path.relpath(path, old)))
        return path if path.exists() and not path.is_relative_to(old) else there

    def find(path: Path) -> Path:
        return there if (there := follow(path)).exists() else path

    return _changed(spec, directory, find, follow)


def check_data(spec: JobSpec, tasks: Iterable[TaskSpec]) -> None:
    """Check that a run finds the data of these tasks again.

    Raises:
        RunError: the folder of a task's data does not exist.
    """
    for task in tasks:
        if "://" not in task.data and not Path(task.data).exists():
            raise RunError(
                f"The data of task '{task.name}' is no longer at '{task.data}'. Write its new place as `data` of this "
                f"task into '{spec.run_directory / 'spec.yaml'}'."
            )


def _changed(spec: JobSpec, directory: Path, reads: Change, writes: Change) -> JobSpec:
    """Return a spec with changed local paths; URIs of other filesystems and of servers stay as they are.

    Args:
        reads: changes the path of a file or folder that training reads.
        writes: changes the path of a file or folder that training writes.
    """

    def local(path: str, change: Change) -> str:
        return path if "://" in path else str(change(Path(path)))

    weights, uri = spec.backbone.weights, spec.tracking.uri
    if weights is not None and weights.endswith(FILE_TYPES):
        weights = local(weights, reads)
    if uri is not None:
        uri, database = resolve(uri)
        uri = uri if database is None else uri.replace(str(database), str(writes(database)), 1)
    tasks = tuple(
        replace(
            task,
            data=local(task.data, reads),
            cache_features=task.cache_features and local(task.cache_features, writes),
        )
        for task in spec.tasks
    )
    return replace(
        spec,
        directory=str(directory),
        backbone=replace(spec.backbone, weights=weights),
        tasks=tasks,
        checkpoints=replace(spec.checkpoints, uri=spec.checkpoints.uri and local(spec.checkpoints.uri, writes)),
        tracking=replace(spec.tracking, uri=uri),
    )
