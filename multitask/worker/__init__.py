"""A worker: it computes the gradients of one task, step by step, and exchanges them with a parameter server."""

from multitask.worker.gradients import ONE_AT_A_TIME, StepSettings, problem_of, task_loss
from multitask.worker.learner import Learner, StepResult
from multitask.worker.loop import train_steps
from multitask.worker.mixing import make_mix
from multitask.worker.network_learner import NetworkLearner
from multitask.worker.server import Server, Values
from multitask.worker.snapshots import SnapshotPart
from multitask.worker.task_worker import TaskWorker, WorkerStart

__all__ = [
    "ONE_AT_A_TIME",
    "Learner",
    "NetworkLearner",
    "Server",
    "SnapshotPart",
    "StepResult",
    "StepSettings",
    "TaskWorker",
    "Values",
    "WorkerStart",
    "make_mix",
    "problem_of",
    "task_loss",
    "train_steps",
]
