"""The trainer: many tasks on one shared backbone, their patches private, on Ray."""

from multitask.startup import put_off_torch_compile

put_off_torch_compile()

from multitask import cascade  # noqa: E402
from multitask.runs import Run  # noqa: E402
from multitask.spec import JobSpec, SpecError, load_spec  # noqa: E402
from multitask.trainer import Stopped, resume, train  # noqa: E402
from multitask.worker import TrainingError  # noqa: E402

__all__ = ["JobSpec", "Run", "SpecError", "Stopped", "TrainingError", "cascade", "load_spec", "resume", "train"]
