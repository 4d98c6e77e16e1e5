"""Turns pydantic's validation errors into lines that name the file, the key and what is allowed there."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError


def explain(
    where: str,
    error: ValidationError,
    *,
    schema: Mapping[str, Any],
    within: tuple[str | int, ...] = (),
    places: Sequence[int] = (),
) -> str:
    """One line for each problem.

    Args:
        schema: JSON schema of the spec.
        within: where in the spec the checked part stands.
        places: of each task the number of the entry in the file that it comes from, where they differ.
    """
    lines = []
    for problem in error.errors(include_url=False):
        location = (*within, *problem["loc"])
        if places and location[:1] == ("tasks",) and len(location) > 1:
            location = ("tasks", places[int(location[1])], *location[2:])
        key, allowed = _locate(location, schema)
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            near = difflib.get_close_matches(str(problem["loc"][-1]), allowed)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            message = f"unknown key; {hint}allowed here: {', '.join(allowed)}"
        elif problem["type"] in ("missing", "missing_argument"):
            message = "this key is required"
        elif isinstance(problem.get("input"), str | int | float | bool):
            message += f", found {problem['input']!r}"
        lines.append(f"{where}: {key or 'spec'}: {message}")
    # What is wrong with an entry is wrong with each of its tasks.
    return "\n".join(dict.fromkeys(lines))


def _locate(location: tuple[str | int, ...], schema: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The dotted key of an error's location as the file has it, and the keys allowed beside it."""
    node, allowed, key = schema, list(schema["properties"]), ""
    for part in location:
        if part in node.get("discriminator", {}).get("mapping", {}):
            # pydantic names the union member that `name` chose; the file has no such key.
            node = schema["$defs"][node["discriminator"]["mapping"][part].rpartition("/")[2]]
            continue
        key += f"[{part}]" if isinstance(part, int) else f".{part}"
        allowed = list(node.get("properties", {}))
        open_keys = node.get("additionalProperties")
        other = open_keys if isinstance(open_keys, Mapping) else {}
        node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, other)
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return key.removeprefix("."), allowed
