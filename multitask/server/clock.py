"""The time as the parameter server reads it."""

from typing import Protocol


class Clock(Protocol):
    """The time of a process. The module `time` is one."""

    def monotonic(self) -> float:
        """Return seconds that never run backwards."""

    def time_ns(self) -> int:
        """Return nanoseconds since 1970. Two processes that start one after the other get different numbers."""
