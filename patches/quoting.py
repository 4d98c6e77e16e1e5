"""How messages quote what a user or a file gave: enough to recognise it, and never more than 200 characters."""

import reprlib

QUOTED = 200
"""Largest number of characters that a message quotes of one value."""
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = QUOTED
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 20


def quoted(value: object) -> str:
    """Return `repr(value)`, shortened to `QUOTED` characters. Lists and dicts that are long or deep are cut first."""
    return shortened(_REPR.repr(value))


def shortened(text: object, limit: int = QUOTED) -> str:
    """Return the text, or its first `limit` characters with an ellipsis. Characters that UTF-8 lacks are escaped."""
    whole = str(text).encode("utf-8", "backslashreplace").decode()
    return whole if len(whole) <= limit else f"{whole[: limit - 1]}…"
