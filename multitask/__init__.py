"""The trainer: many tasks on one shared backbone, their patches private, on Ray."""

from multitask import cascade
from multitask.runs import Run
from multitask.spec import JobSpec, SpecError, load_spec
from multitask.trainer import Stopped, resume, train
from multitask.worker import TrainingError

__all__ = ["JobSpec", "Run", "SpecError", "Stopped", "TrainingError", "cascade", "load_spec", "resume", "train"]
