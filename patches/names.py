"""The error message for an unknown name of a backbone, method, option or task."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown_name_message(kind: str, given: str, allowed: Iterable[str]) -> str:
    """Return a message that `given` is unknown, with similar names and all allowed ones.

    Args:
        kind: the kind of thing that the name stands for, in the singular ("backbone", "option of patch method 'full'").
        given: the unknown name, as it was written.
        allowed: every allowed name, in the order in which the message lists them.
    Returns:
        One line. The caller raises its own error class with it.
    """
    names = list(allowed)
    near = get_close_matches(str(given), names, n=3, cutoff=0.6)
    meant = f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    known = f" Known: {', '.join(names)}." if names else " There are none to choose from."
    return f"Unknown {kind} '{given}'.{meant}{known}"
