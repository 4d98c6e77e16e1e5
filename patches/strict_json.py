"""JSON of files that others may have written: what Python's parser lets pass in silence is an error here."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

from patches.quoting import quoted

LEVELS = 32
"""Largest number of lists and dicts inside each other."""


def parse_json(text: str | bytes) -> Any:
    """Return the content of a JSON text.

    Raises:
        ValueError: the text is not UTF-8 or not JSON, names a key twice, has a number that is not finite or a character
            that UTF-8 lacks, or nests more than `LEVELS` lists and dicts.
    """
    too_deep = f"more than {LEVELS} lists and dicts inside each other"
    try:
        content = json.loads(
            text.decode() if isinstance(text, bytes) else text,
            object_pairs_hook=_without_doubles,
            parse_constant=_not_a_number,
        )
    except RecursionError:
        raise ValueError(too_deep) from None
    level = [content]
    for _ in range(LEVELS + 1):
        for value in level:
            if isinstance(value, str):
                value.encode()  # raises UnicodeEncodeError, a ValueError, for half of a surrogate pair
            elif isinstance(value, float) and not math.isfinite(value):
                _not_a_number("a number beyond the range of floats")
        level = [child for value in level for child in _children(value)]
        if not level:
            return content
    raise ValueError(too_deep)


def _children(value: Any) -> Sequence[Any]:
    """Return the members of a list, the keys and values of a dict, and nothing for any other value."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list) else ()


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        double, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {quoted(double)} twice")
    return found


def _not_a_number(found: str) -> NoReturn:
    raise ValueError(f"{found}, which is no finite number")
