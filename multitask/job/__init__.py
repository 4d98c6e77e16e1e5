"""What a job spec becomes: models, groups of tensors, tables, caches and checkpoints."""

from multitask.job.job import Job, Loaded

__all__ = ["Job", "Loaded"]
