"""The history of a task's training loss: few points, however many steps the run has."""

import math
from typing import Annotated

from pydantic import Field, Strict

Loss = tuple[
    Annotated[int, Strict(), Field(ge=0)],
    Annotated[float, Strict(), Field(allow_inf_nan=False)],
    Annotated[int, Strict(), Field(gt=0, lt=2**53)],
]
"""One point: the round of its last step, the mean training loss of its steps, and the number of its steps."""
MOST_POINTS = 200
"""Largest number of points of a task. A curve needs no more, and the status file is written about once a second."""


def add_loss(losses: list[Loss], round_: int, loss: float) -> None:
    """Add a step's loss to a history, whose points all stand for equally many steps, except for the last one.

    When there are too many points, neighbours are joined, so that a point stands for twice as many steps. A server that
    went back to a checkpoint makes its later rounds again: the points of those rounds are dropped.

    Args:
        losses: the history, which is changed.
        round_: round of the step.
        loss: mean loss of the step's images. A loss that is not finite is left out.
    """
    if not math.isfinite(loss):
        return
    while losses and losses[-1][0] > round_:
        losses.pop()
    last = losses[-1] if losses else None
    if last is not None and last[2] < losses[0][2]:
        losses[-1] = _joined(last, (round_, loss, 1))
    else:
        losses.append((round_, loss, 1))
    if len(losses) > MOST_POINTS:
        pairs = zip(losses[0:-1:2], losses[1::2], strict=True)
        losses[:] = [*(_joined(*pair) for pair in pairs), *(losses[-1:] if len(losses) % 2 else ())]


def _joined(first: Loss, second: Loss) -> Loss:
    steps = first[2] + second[2]
    return second[0], (first[1] * first[2] + second[1] * second[2]) / steps, steps
