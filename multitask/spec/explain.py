"""Turn pydantic's validation errors into lines that name the file, the key and the allowed values."""

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
    """Describe each problem of a validation error in one line.

    Args:
        where: the file's name, with which each line begins.
        schema: JSON schema of the spec.
        within: location of the validated part in the spec.
        places: for each task, the index of the file's entry that it comes from. It may be left out where a task's own
            index is the same.
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
    # An entry with a list of resolutions becomes several tasks, and each of them repeats the entry's problem.
    return "\n".join(dict.fromkeys(lines))


def _locate(location: tuple[str | int, ...], schema: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the dotted key of an error's location, as the file writes it, and the keys that are allowed beside it."""
    node, allowed, key = schema, list(schema["properties"]), ""
    for part in location:
        if part in node.get("discriminator", {}).get("mapping", {}):
            # pydantic's location has the union member that `name` selects; the file has no key for it.
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
