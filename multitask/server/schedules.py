"""Learning rates as functions of rounds, by name.

The server sets one rate for all tasks from the number of rounds done, so the rates of two tasks never drift apart,
whatever the sizes of their data sets.
Source: Mudrakarta et al., "K for the Price of 1", ICLR 2019, section 5.3. The paper asks for an equal ratio of data-set
size to epochs per decay. All tasks decay after the same number of steps only if the product of the two is equal, which
is the number of images per decay. Counting rounds ensures that.
"""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]
"""A function from the number of rounds done (0, 1, ...) to the learning rate."""


def constant(rate: float) -> Schedule:
    """Keep the rate."""
    return lambda _done: rate


def exponential(rate: float, *, factor: float, every_rounds: int) -> Schedule:
    """Multiply the rate by `factor` once after every `every_rounds` rounds."""
    return lambda done: rate * factor ** (done // every_rounds)


def cosine(rate: float, *, rounds: int, warm_up_rounds: int = 0) -> Schedule:
    """Raise the rate linearly from 0 to `rate` over the warm-up, then lower it along half a cosine to 0.

    Args:
        rounds: number of rounds after which the rate is 0, warm-up included; more than `warm_up_rounds`.
    Source: Jia et al., "Visual Prompt Tuning", ECCV 2022. Their code also starts at 0 and lets the cosine begin where
        the warm-up ends. It changes the rate once an epoch; we change it every round, because the epochs of two tasks
        do not end together.
    """
    falling = rounds - warm_up_rounds

    def at(done: int) -> float:
        if done < warm_up_rounds:
            return rate * done / warm_up_rounds
        return rate * 0.5 * (1 + math.cos(math.pi * min(done - warm_up_rounds, falling) / falling))

    return at


SCHEDULES: dict[str, Callable[..., Schedule]] = {"constant": constant, "cosine": cosine, "exponential": exponential}
