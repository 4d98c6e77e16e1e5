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


def cosine(rate: float, *, rounds: int) -> Schedule:
    """Half a cosine from `rate` down to 0 after `rounds` rounds."""
    return lambda done: rate * 0.5 * (1 + math.cos(math.pi * min(done, rounds) / rounds))


SCHEDULES: dict[str, Callable[..., Schedule]] = {"constant": constant, "cosine": cosine, "exponential": exponential}
