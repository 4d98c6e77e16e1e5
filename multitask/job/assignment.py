"""How many of a job's workers each task gets."""

import math
from collections.abc import Mapping
from fractions import Fraction


def share_out(workers: int, images: Mapping[str, int]) -> dict[str, int]:
    """Task -> its workers, in proportion to its training images and at least one.

    By largest remainders, once each task whose share is below one has its one; of equal remainders the first task's
    counts.

    Args:
        workers: of all tasks together, as many as tasks or more.
        images: task -> rows of its training table.
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


def rank_of(worker: str) -> int:
    """Number of a worker among those of its task."""
    return int(worker.rpartition("/")[2])
