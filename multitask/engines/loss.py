"""How callers see that a process is lost, and what the driver tells of a loss."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError

from multitask.cluster.interface import Cluster
from multitask.errors import TrainingError
from multitask.job.job import Job


class NotBegunError(RuntimeError):
    """The called process has just started, perhaps in place of a lost one, and has no values yet."""


class RestartAllError(RuntimeError):
    """A process is lost, and all processes have to start again from the latest checkpoint."""


ENDED = (RayActorError, OutOfMemoryError)
"""Errors of a call whose process is gone; OutOfMemoryError where Ray's memory monitor has ended the process."""
LOST = (*ENDED, ObjectLostError, NotBegunError)
"""Errors of a call of the server, or of a read of its values, when its process or node is gone."""
Answer = TypeVar("Answer")


def require_begun(held: Answer | None) -> Answer:
    """Return what an actor holds since its `begin`.

    Raises:
        NotBegunError: `begin` has not been called in this process.
    """
    if held is None:
        raise NotBegunError("This process has not begun: it has no values yet.")
    return held


class LastAnswer:
    """Keeps the last answer to a question that may be asked only once.

    The caller numbers its questions. When the connection breaks, the caller cannot know whether its question arrived,
    so it asks again under the same number and gets the same answer.
    """

    def __init__(self) -> None:
        self._number = 0
        self._answer: Any = None

    def to(self, number: int, make: Callable[[], Answer]) -> Answer:
        """Return the answer to a question.

        Args:
            number: number of the question, from 1; the number of the last question returns its answer again.
            make: makes the answer to a new question.
        """
        if number != self._number:
            self._answer = make()
            self._number = number
        answer: Answer = self._answer
        return answer


def start_timeout(cluster: Cluster, job: Job, missing: Iterable[str]) -> TrainingError:
    """Return the error of a run whose workers `missing` did not start in time."""
    total: Counter[str] = Counter()
    for node in cluster.nodes().values():
        total.update(node.resources)
    return TrainingError(
        f"Workers {list(missing)} did not start within {job.spec.resources.start_timeout_s:g} s. The cluster has "
        f"{dict(total)}, of which {cluster.free_resources()} is free. Stop other jobs, or lower "
        "resources.cpus_per_worker or resources.gpus_per_worker."
    )
