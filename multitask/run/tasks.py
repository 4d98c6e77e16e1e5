"""The file `tasks.json` of a run: the class list, the tables and the preprocessing that each task began with."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from multitask.errors import RunError
from multitask.job import Job
from multitask.job.models import attach_task, load_backbone
from multitask.job.tables import open_split, preprocessing
from multitask.spec.schema import JobSpec, TaskSpec
from patches.files import read_regular, write_atomic
from patches.quoting import shortened

TASKS = "tasks.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskRecord:
    """What one task began with. A table that changes later changes none of it."""

    classes: tuple[str, ...]
    """Names of the model's outputs, in order."""
    tables: dict[str, str]
    """Split -> `ImageTable.identity` of the table that training read."""
    preprocessing: dict[str, Any]
    """How an image becomes the network's input, as a bundle says it."""


_RECORDS = TypeAdapter(dict[str, TaskRecord])


def write_tasks(directory: Path, job: Job, before: Mapping[str, TaskRecord]) -> dict[str, TaskRecord]:
    """Write and return the record of each of a job's tasks. A task that has one keeps it.

    Args:
        before: task -> its record, for the tasks that have one.
    """
    records = {
        name: before.get(name) or TaskRecord(classes, job.table_identities(name), preprocessing(job.task(name)))
        for name, classes in job.classes.items()
    }
    content = {name: asdict(record) for name, record in records.items()}
    write_atomic(directory / TASKS, (json.dumps(content, indent=1) + "\n").encode())
    return records


def read_tasks(directory: Path) -> dict[str, TaskRecord]:
    """Return task -> its record. A run of version 0.1 has none, and the result is empty.

    Raises:
        RunError: the file is damaged.
    """
    path = directory / TASKS
    try:
        return _RECORDS.validate_json(read_regular(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(
            f"'{path}': expected the class list, the tables and the preprocessing of each task, found a damaged file "
            f"({shortened(error)}). Restore it from a copy, or remove it: then the class lists are read from the "
            "training tables, which must be those that the run began with."
        ) from error


def record_of(task: TaskSpec, records: Mapping[str, TaskRecord]) -> TaskRecord:
    """Return a task's record. In a run of version 0.1, which has none, the class list is that of its training table.

    Raises:
        DataError: there is no record, and the training table cannot be opened.
    """
    if task.name in records:
        return records[task.name]
    return TaskRecord(open_split(task, "train", verify=False).classes, {}, preprocessing(task))


def kept_classes(spec: JobSpec, records: Mapping[str, TaskRecord]) -> dict[str, tuple[str, ...]]:
    """Return the class list that each task of a run goes on with.

    Raises:
        RunError: in a run of version 0.1, which has no records, a head has more outputs than its task has classes.
        DataError: there is no record, and the training table cannot be opened.
    """
    kept = {task.name: record_of(task, records).classes for task in spec.tasks}
    for task in spec.tasks:
        if task.name in records:
            continue
        outputs, classes = attach_task(load_backbone(spec, weights=None), task, spec).num_classes, len(kept[task.name])
        if outputs > classes:
            raise RunError(
                f"Task '{task.name}' was begun with version 0.1, with a head of {outputs} outputs for {classes} "
                "classes. Such a model cannot be exported, and this version trains heads with exactly one output for "
                f"each class. Start a new run with tasks.num_classes {classes}."
            )
    return kept


def warn_of_other_tables(job: Job, records: Mapping[str, TaskRecord]) -> None:
    """Log a warning for each table of a job that is no longer the one that its task began with."""
    for name, record in records.items():
        for split, identity in job.table_identities(name).items() if name in job.classes else ():
            if record.tables.get(split, identity) != identity:
                log.warning(
                    "Task '%s': its %s table is not the one that the run began with. Labels are matched by class name, "
                    "but the run goes on at the row where it stopped, so some images are read twice and others not.",
                    name,
                    split,
                )
