"""The options of patch methods: the fields that a method declares, and checks of their values."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any, TypeGuard

from patches.errors import PatchError
from patches.method import Patch
from patches.quoting import quoted

SWITCH = (True, False)
"""The allowed values of an option that is a switch, for `check_choice`."""


def declared_options(method: type[Patch]) -> list[str]:
    """Return the names of a method's options: the fields that its constructor takes."""
    return [field.name for field in dataclasses.fields(method) if field.init]  # type: ignore[arg-type]


def option_values(method: Patch) -> dict[str, Any]:
    """Return every option of a method with its value, defaults included, as JSON would give it back."""
    return json.loads(json.dumps({name: getattr(method, name) for name in declared_options(type(method))}))


def check_whole(option: str, value: object, low: int, high: int | None) -> None:
    """Check that an option is a whole number from `low` to `high`, or of at least `low` if `high` is None.

    Raises:
        PatchError: the value is something else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        allowed = f"of {low} or more" if high is None else f"from {low} to {high}"
        raise PatchError(f"Option {option}={quoted(value)}: use a whole number {allowed}.")


def check_choice(option: str, value: object, allowed: Sequence[str | bool]) -> None:
    """Check that an option is one of the allowed words or switches.

    Raises:
        PatchError: the value is something else.
    """
    if not isinstance(value, type(allowed[0])) or value not in allowed:
        *others, last = (str(choice).lower() for choice in allowed)
        raise PatchError(f"Option {option}={quoted(value)}: use {', '.join(others)} or {last}.")


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether the value of an option is a number that a float can hold: no switch, no NaN and no infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
