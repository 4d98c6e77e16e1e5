"""The error of a job spec that cannot run, and how its message quotes what was found.

`patches.quoting` is not imported, because a spec is read and checked without torch, which `patches` imports.
"""

QUOTED = 100
"""Number of characters of a value, a key or a file's name that a message quotes at most."""


class SpecError(ValueError):
    """A job spec that cannot run; the message names the file, the key and what is allowed."""


def quoted(value: object) -> str:
    """Return a value as a message quotes it: as Python writes it, with the middle left out if it is long."""
    return shortened(repr(value))


def shortened(text: str, length: int = QUOTED) -> str:
    """Return a text whose middle is left out if it has more than `length` characters."""
    return text if len(text) <= length else f"{text[: length * 2 // 3]} ... {text[5 - length // 3 :]}"
