"""The error message for an unknown name of a backbone, method, option or task."""

from collections.abc import Iterable
from difflib import get_close_matches

from patches.quoting import QUOTED, quoted, shortened

LISTED = 400
"""Largest number of characters of the list of allowed names."""


def unknown_name_message(kind: str, given: str, allowed: Iterable[str]) -> str:
    """Return a message that `given` is unknown, with similar names and all allowed ones.

    Args:
        kind: the kind of thing that the name stands for, in the singular ("backbone", "option of patch method 'full'").
        given: the unknown name, as it was written. The message quotes its beginning if it is long.
        allowed: every allowed name, in the order in which the message lists them, as far as there is room.
    Returns:
        One line. The caller raises its own error class with it.
    """
    names = list(allowed)
    near = get_close_matches(str(given)[:QUOTED], names, n=3, cutoff=0.6)
    meant = f" Did you mean {' or '.join(map(quoted, near))}?" if near else ""
    known = f" Known: {shortened(', '.join(names), LISTED)}." if names else " There are none to choose from."
    return f"Unknown {kind} '{shortened(given)}'.{meant}{known}"
