"""The trainer: many tasks on one shared backbone, their patches private, on Ray.

What the package offers is imported when it is first used, so that `import multitask` takes no time.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from multitask.startup import RUN_PROCESS, put_off_torch_compile

if TYPE_CHECKING:
    from multitask import cascade
    from multitask.errors import TrainingError
    from multitask.run.directory import Run
    from multitask.run.report import write_report
    from multitask.run.trainer import Stopped, resume, train
    from multitask.spec import JobSpec, SpecError, load_spec

__all__ = [
    "JobSpec",
    "Run",
    "SpecError",
    "Stopped",
    "TrainingError",
    "cascade",
    "load_spec",
    "resume",
    "train",
    "write_report",
]

_MODULES = {
    "JobSpec": "multitask.spec",
    "Run": "multitask.run.directory",
    "SpecError": "multitask.spec",
    "Stopped": "multitask.run.trainer",
    "TrainingError": "multitask.errors",
    "load_spec": "multitask.spec",
    "resume": "multitask.run.trainer",
    "train": "multitask.run.trainer",
    "write_report": "multitask.run.report",
}
"""Public name -> the module that defines it."""

if RUN_PROCESS in os.environ:
    put_off_torch_compile()


def __getattr__(name: str) -> Any:
    if name == "cascade":
        return importlib.import_module("multitask.cascade")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'multitask' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
