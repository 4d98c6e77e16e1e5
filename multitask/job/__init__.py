"""The parts that a job spec is turned into: models, groups of tensors, tables, caches and checkpoints."""

from multitask.job.inputs import LoadedInputs
from multitask.job.job import Job

__all__ = ["Job", "LoadedInputs"]
