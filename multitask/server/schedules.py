"""Learning rates as functions of rounds, by name.

The server sets one rate for all tasks from the number of rounds done, so the rates of two tasks never drift apart,
whatever the sizes of their data sets.
Source: Mudrakarta et al., "K for the Price of 1", ICLR 2019, section 5.3. The paper says that the ratio of data-set
size to epochs per decay is equal for all tasks; for equal rates at equal steps it has to be the product, images per
decay, which is what counting rounds gives.
"""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]
"""From rounds done (0, 1, ...) to the learning rate."""


def constant(rate: float) -> Schedule:
    return lambda _done: rate


def exponential(rate: float, *, factor: float, every_rounds: int) -> Schedule:
    """Multiply the rate by `factor` after every `every_rounds` rounds, in steps."""
    return lambda done: rate * factor ** (done // every_rounds)


def cosine(rate: float, *, rounds: int, warm_up_rounds: int = 0) -> Schedule:
    """Linear from 0 to `rate` over the warm-up, then half a cosine down to 0 after `rounds` rounds in all.

    Args:
        rounds: more than `warm_up_rounds`.
    Source: Jia et al., "Visual Prompt Tuning", ECCV 2022, whose code starts at 0 too and has the cosine begin where the
        warm-up ends. It moves once an epoch, we every round: epochs of two tasks do not end together.
    """
    falling = rounds - warm_up_rounds

    def at(done: int) -> float:
        if done < warm_up_rounds:
            return rate * done / warm_up_rounds
        return rate * 0.5 * (1 + math.cos(math.pi * min(done - warm_up_rounds, falling) / falling))

    return at


SCHEDULES: dict[str, Callable[..., Schedule]] = {"constant": constant, "cosine": cosine, "exponential": exponential}
