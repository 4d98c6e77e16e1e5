"""The tables and backbones that a job reads, loaded once for all jobs that use them."""

from dataclasses import dataclass, field

import patches
from multitask.data import ImageTable
from multitask.job.models import backbone_key, load_backbone
from multitask.job.tables import open_split, table_key
from multitask.spec.errors import SpecError
from multitask.spec.schema import JobSpec, TaskSpec

SPLITS = ("train", "validation")
"""Tables that training reads of each task."""


@dataclass(frozen=True)
class LoadedInputs:
    """Tables and backbones that several jobs share, such as the trials of a sweep; picklable."""

    tables: dict[str, ImageTable] = field(default_factory=dict)
    """`table_key` of a task and a split -> the table, opened and checked."""
    backbones: dict[str, patches.Backbone] = field(default_factory=dict)
    """`backbone_key` of a job -> its backbone with its weights."""

    def add(self, spec: JobSpec) -> None:
        """Load the tables and the backbone of a job, except those that are loaded already.

        Raises:
            DataError, patches' errors: a table or the weights cannot be read.
        """
        for task in spec.tasks:
            for split in SPLITS:
                key = table_key(task, split)
                if key not in self.tables:
                    self.tables[key] = open_split(task, split)
        if backbone_key(spec) not in self.backbones:
            self.backbones[backbone_key(spec)] = load_backbone(spec, spec.backbone.weights)


def check_data(spec: JobSpec, task: TaskSpec, train: ImageTable, validation: ImageTable) -> None:
    """Check that a task's two tables have the same classes, and that its head has an output for each class.

    Raises:
        SpecError: the class lists differ, or the head has too few outputs.
    """
    if train.classes != validation.classes:
        raise SpecError(
            f"Task '{task.name}': train and validation under '{task.data}' have different class lists "
            f"({len(train.classes)} and {len(validation.classes)} classes). Import both with one class list."
        )
    head = task.num_classes or spec.backbone.num_classes
    if len(train.classes) > head:
        where = "tasks.num_classes" if task.num_classes else "backbone.num_classes (the head that this task shares)"
        raise SpecError(
            f"Task '{task.name}': its data has {len(train.classes)} classes, but its head has {head} outputs. "
            f"Set {where} to {len(train.classes)} or more."
        )
