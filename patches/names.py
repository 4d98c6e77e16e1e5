"""One wording for every name that is not known: backbones, methods, options, tasks."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown_name_message(kind: str, given: str, allowed: Iterable[str]) -> str:
    """Say that `given` is no known `kind`, and name what is near it and what is allowed.

    Args:
        kind: what the name should have been, in the singular ("backbone", "option of patch method 'full'").
        given: the name as it was written.
        allowed: every name that would have been accepted, in the order to list them.
    Returns:
        One line, for the caller's own error class.
    """
    names = list(allowed)
    near = get_close_matches(str(given), names, n=3, cutoff=0.6)
    meant = f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    known = f" Known: {', '.join(names)}." if names else " There are none to choose from."
    return f"Unknown {kind} '{given}'.{meant}{known}"
