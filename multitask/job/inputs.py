"""The tables and backbones that a job reads, loaded once for all jobs that use them."""

from dataclasses import dataclass, field

import patches
from multitask.data import ImageTable
from multitask.job.models import backbone_key, load_backbone
from multitask.job.tables import open_split, table_key
from multitask.spec.schema import JobSpec

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

    def train_rows(self, spec: JobSpec) -> dict[str, int]:
        """Return task -> number of rows of its training table, for the tasks of a job whose tables are loaded."""
        return {task.name: self.tables[table_key(task, "train")].num_rows for task in spec.tasks}
