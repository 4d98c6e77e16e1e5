"""Division of a job's workers among its tasks."""

import math
from collections.abc import Mapping
from fractions import Fraction

from multitask.spec.errors import SpecError


def share_out(workers: int, images: Mapping[str, int]) -> dict[str, int]:
    """Divide workers among tasks in proportion to their training images, with at least one worker for each task.

    Each task whose proportional share is below one gets one worker. The other tasks share the remaining workers by the
    method of largest remainders; where remainders are equal, the task that comes first gets the worker.

    Args:
        workers: number of workers of all tasks together, at least the number of tasks.
        images: task -> number of rows of its training table.
    Returns:
        Task -> number of its workers.
    """
    one_each: set[str] = set()
    while True:
        seats = workers - len(one_each)
        total = sum(images[task] for task in images if task not in one_each)
        shares = {task: Fraction(seats * images[task], total) for task in images if task not in one_each}
        below = {task for task, share in shares.items() if share < 1}
        if not below:
            break
        one_each |= below
    given = {task: math.floor(shares[task]) if task in shares else 1 for task in images}
    by_remainder = sorted(shares, key=lambda task: given[task] - shares[task])
    for task in by_remainder[: workers - sum(given.values())]:
        given[task] += 1
    return given


def check_workers(workers: Mapping[str, int], rows: Mapping[str, int]) -> None:
    """Check that each worker has rows of its own to train on.

    Args:
        workers: task -> number of its workers.
        rows: task -> number of rows of its training table.
    Raises:
        SpecError: a task has more workers than rows.
    """
    for task, number in workers.items():
        if number > rows[task]:
            raise SpecError(
                f"Task '{task}' has {number} workers, but its training table has {rows[task]} rows, and each worker "
                f"needs one of its own: set at most {rows[task]} workers."
            )


def rank_of(worker: str) -> int:
    """Return the number of a worker among the workers of its task: 0 for the first."""
    return int(worker.rpartition("/")[2])
