"""How the loss of a process shows itself to those who call it."""

from collections.abc import Callable
from typing import Any, TypeVar

from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError


class NotBegunError(RuntimeError):
    """This process has just started, perhaps in the place of one that was lost, and has no values yet."""


ENDED = (RayActorError, OutOfMemoryError)
"""What a call of a process meets when that is gone; the second where Ray's memory monitor has ended it."""
LOST = (*ENDED, ObjectLostError, NotBegunError)
"""What a call of the server, or a look at its values, meets when its process or node is gone."""
Actor = Any
"""A handle; Ray's own types differ between a class and its options."""
Answer = TypeVar("Answer")


def begun(what: Answer | None) -> Answer:
    """What an actor has held since its `begin`."""
    if what is None:
        raise NotBegunError("Its values are still to come.")
    return what


class LastAnswer:
    """What was handed out last, for one who asks again because the answer was lost: it may have been made or not."""

    def __init__(self) -> None:
        self._number = 0
        self._answer: Any = None

    def to(self, number: int, make: Callable[[], Answer]) -> Answer:
        """Args:
        number: of the question, from 1; the same where it is asked again.
        make: gives out what it gives out once.
        """
        if number != self._number:
            self._answer = make()
            self._number = number
        answer: Answer = self._answer
        return answer
