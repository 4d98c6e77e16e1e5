"""How messages quote what a user or a file gave: enough to recognise it, and never more than 200 characters."""

import re
import reprlib

QUOTED = 200
"""Largest number of characters that a message quotes of one value."""
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters but tab and newline. A terminal obeys them: some change its colours, or hide what was printed."""
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = QUOTED
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 20


def quoted(value: object) -> str:
    """Return `repr(value)`, shortened to `QUOTED` characters. Lists and dicts that are long or deep are cut first."""
    return shortened(_REPR.repr(value))


def shortened(text: object, limit: int = QUOTED) -> str:
    """Return the text, or its first `limit` characters with an ellipsis.

    Control characters, such as those of a terminal's escape codes, and characters that UTF-8 lacks are escaped.
    """
    whole = str(text).encode("utf-8", "backslashreplace").decode()
    whole = _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", whole)
    return whole if len(whole) <= limit else f"{whole[: limit - 1]}…"
