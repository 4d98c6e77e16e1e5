"""The errors that end a training run."""

from collections.abc import Mapping


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the worker, its task and the step."""

    def __init__(self, message: str, about: Mapping[str, object] | None = None) -> None:
        """Args:
        about: task, worker and step for the log, where one worker is to blame.
        """
        super().__init__(message)
        self.about = dict(about or {})


def failure(worker: str, task: str, steps: int, why: object) -> TrainingError:
    """The error of a worker that raised.

    Args:
        steps: that it has made.
    """
    about = {"task": task, "worker": worker, "step": steps}
    made = f"{steps} step{'' if steps == 1 else 's'}"
    return TrainingError(f"Worker '{worker}' of task '{task}' failed after {made}: {why}", about)
