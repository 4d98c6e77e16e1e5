"""The trace of a simulated run, for people: what happened when."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

ADDRESS = re.compile(" at 0x[0-9a-f]+")
LONGEST = 160
"""Number of characters of a value that are shown."""


def lines(trace: Iterable[tuple[Any, ...]]) -> Iterator[str]:
    """Yield one line for each event of `World.trace`.

    Arguments and answers are shown as they are now; a process may have changed those that it got.
    """
    for time_s, kind, *about in trace:
        yield f"{time_s:10.4f}  {kind:8}  {_text(kind, about)}"


def _text(kind: str, about: list[Any]) -> str:
    match kind, about:
        case "call", [call]:
            arguments = ", ".join(map(_short, call.arguments))
            return f"#{call.number} {call.sender} -> {call.actor.name}.{call.method}({arguments})"
        case (("answer" | "failure"), [call, value]):
            return f"#{call.number} {call.sender} <- {call.actor.name}.{call.method}: {_short(value)}"
    return " ".join(word if isinstance(word, str) else repr(word) for word in about)


def _short(value: Any) -> str:
    if isinstance(value, set):  # its order is not decided by the seed
        return f"{{{', '.join(sorted(map(repr, value)))}}}"
    text = f"{type(value).__name__}: {value}" if isinstance(value, Exception) else repr(value)
    text = ADDRESS.sub("", " ".join(text.split()))
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."
