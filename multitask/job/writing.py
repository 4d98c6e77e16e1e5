"""Writing what a run must not lose: while a file cannot be written, that is said, and it is tried again."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from multitask.errors import TrainingError

Result = TypeVar("Result")
WAITS_S = (1.0, 5.0, 15.0, 40.0)
"""Seconds between the attempts to write a file. Whoever makes room meanwhile saves the run."""

log = logging.getLogger(__name__)


def keep_trying(what: str, write: Callable[[], Result]) -> Result:
    """Call a function that writes a file of a run, and return its result.

    If the file cannot be written a warning says so at once, and the function is called again after each of `WAITS_S`.

    Args:
        what: name of the file in messages.
    Raises:
        TrainingError: the file could not be written in all this time.
    """
    for wait_s in WAITS_S:
        try:
            return write()
        except OSError as error:
            log.warning("%s cannot be written, which is tried again in %g s: %s", what, wait_s, error)
            time.sleep(wait_s)
    try:
        return write()
    except OSError as error:
        raise TrainingError(f"{what} cannot be written: {error}") from error
