"""The errors of a training run and of its directory."""

from collections.abc import Mapping


class TrainingError(RuntimeError):
    """Training cannot go on. The message names the worker, its task and the step where one worker is to blame."""

    def __init__(self, message: str, about: Mapping[str, object] | None = None) -> None:
        """Args:
        about: task, worker and step for the log, where one worker is to blame.
        """
        super().__init__(message)
        self.about = dict(about or {})


class RunError(ValueError):
    """A directory does not have the run that was expected. The message says what is missing and how to make it."""


def failure(worker: str, task: str, steps: int, why: object) -> TrainingError:
    """Make the error for a worker that raised an exception.

    Args:
        steps: number of steps that the worker has made.
        why: the exception, or its text.
    """
    about = {"task": task, "worker": worker, "step": steps}
    made = f"{steps} step{'' if steps == 1 else 's'}"
    return TrainingError(f"Worker '{worker}' of task '{task}' failed after {made}: {why}", about)
