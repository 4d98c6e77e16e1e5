"""Turn pydantic's validation errors into lines that name the file, the key and the allowed values."""

import difflib
from collections.abc import Container, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from multitask.spec.errors import quoted, shortened

LONGEST, MOST = 750, 20
"""Number of characters and of problems after which a message counts the remaining problems, and no longer describes
them."""
MISSING = ("missing", "missing_argument", "union_tag_not_found")
"""pydantic's words for a key that is not there; the last one is a missing `name`."""
UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
USUAL = {
    "lr": "rate",
    "learning_rate": "rate",
    "wd": "weight_decay",
    "type": "name",
    "iterations": "steps",
    "max_steps": "steps",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "patience": "stop_after",
    "early_stopping": "stop_after",
    "model": "backbone",
    "lr_scheduler": "schedule",
    "num_workers": "workers",
    "image_size": "resolution",
}
"""Usual name in other programs -> the key of a spec that means the same."""


TRACKED = "runs are tracked in MLflow, in the store that tracking.uri names"
ONE_CLASS = "each image has exactly one class, and tasks are trained with cross-entropy"
NOT_SUPPORTED = {
    "wandb": f"wandb is not supported: {TRACKED}",
    "tensorboard": f"TensorBoard is not supported: {TRACKED}",
    "multi_label": f"multi-label is not supported: {ONE_CLASS}; make a task of each label",
    "bce": f"binary cross-entropy (multi-label) is not supported: {ONE_CLASS}; make a task of each label",
    "regression": f"regression is not supported: {ONE_CLASS}; divide the numbers into ranges, and make each a class",
    "mse": f"a squared error (regression) is not supported: {ONE_CLASS}; make classes of ranges of the numbers",
    "loss": f"another loss is not supported: {ONE_CLASS}; label_smoothing makes their labels softer",
}
"""Key, or value of an unknown key, that asks for what there is not -> what there is."""
ALIKE = {"multilabel": "multi_label", "bcewithlogits": "bce", "criterion": "loss", "loss_function": "loss"}
"""Another way to write a key of NOT_SUPPORTED -> the key."""


def explain(
    where: str,
    error: ValidationError,
    *,
    schema: Mapping[str, Any],
    places: Sequence[int] = (),
    gaps: Container[str] = (),
) -> tuple[list[str], int]:
    """Describe the problems of a validation error, each in one line, unknown keys first.

    Args:
        where: the file's name, with which each line begins.
        schema: JSON schema of the spec.
        places: for each task, the index of the file's entry that it comes from. It may be left out where a task's own
            index is the same.
        gaps: missing keys that another line describes, or that are missing only because of another problem.
    Returns:
        The lines, and the number of further problems.
    """
    lines, problems = [], _told(error.errors(include_url=False), schema)
    for problem in problems[:MOST]:
        location = problem["loc"]
        if places and location[:1] == ("tasks",) and len(location) > 1:
            location = ("tasks", places[int(location[1])], *location[2:])
        key, node, allowed = _locate(location, schema)
        if problem["type"] not in MISSING or key not in gaps:
            lines.append(line_of(where, key, _describe(problem, key, node, allowed)))
    # An entry with a list of resolutions becomes several tasks, and each of them repeats the entry's problem.
    return list(dict.fromkeys(lines)), len(problems[MOST:])


def _told(problems: Sequence[Mapping[str, Any]], schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the problems to describe: a mistyped key comes before the missing one that it may stand for.

    pydantic counts an entry that is wrong as one that is not there, and looks at no key of a mapping without a name.
    """
    begun = {problem["loc"][:length] for problem in problems for length in range(len(problem["loc"]))}
    told = [problem for problem in problems if problem["type"] != "too_short" or problem["loc"] not in begun]
    for problem in problems:
        if problem["type"] == "union_tag_not_found":
            locations = [(*problem["loc"], key) for key in problem["input"]]
            told += [
                {"type": "extra_forbidden", "loc": location}
                for location in locations
                if location[-1] not in _locate(location, schema)[2]
            ]
    return sorted(told, key=lambda problem: problem["type"] not in UNKNOWN)


def line_of(where: str, key: str, message: str) -> str:
    """Return the line of a problem; a part of a long key or message is left out."""
    return f"{shortened(where, 200)}: {shortened(key) or 'spec'}: {shortened(message, 550)}"


def joined(lines: Sequence[str], more: int = 0) -> str:
    """Join the lines of a message. Those that would make it too long are counted, together with `more` problems."""
    kept = 1
    while kept < len(lines) and sum(len(line) for line in lines[: kept + 1]) <= LONGEST:
        kept += 1
    left = len(lines) - kept + more
    return "\n".join([*lines[:kept], f"and {left} more problem{'s' if left > 1 else ''}"] if left else lines)


def _describe(problem: Mapping[str, Any], key: str, node: Mapping[str, Any], allowed: Sequence[str]) -> str:
    """Say in one line what is wrong with the value of a key, and what is allowed.

    Args:
        problem: one of pydantic's problems.
        node: the schema of the key's value.
        allowed: the keys that are allowed beside the key.
    """
    kind, found = problem["type"], problem.get("input")
    if kind in UNKNOWN:
        name = str(problem["loc"][-1])
        if reason := _not_supported(found) or _not_supported(name):
            return reason
        near = [USUAL[name]] if USUAL.get(name) in allowed else difflib.get_close_matches(name, allowed)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        return f"unknown key; {hint}allowed here: {', '.join(allowed)}"
    if kind in MISSING:
        tags = ", ".join(repr(tag) for tag in node.get("discriminator", {}).get("mapping", {}))
        return f"its name is required, one of {tags}" if tags else "this key is required"
    if kind == "union_tag_invalid":
        given, names = problem["ctx"]["tag"], problem["ctx"]["expected_tags"]
        return f"name is {quoted(given)}, expected one of {names}"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "tuple_type":
        message = "expected a list"
    if kind in ("dataclass_type", "model_attributes_type", "dict_type"):
        if reason := _not_supported(found):
            return reason
        message = "expected keys and values"
        if isinstance(found, str) and ("discriminator" in node or "name" in node.get("properties", {})):
            message += f", for example {key}: {{name: {shortened(found)}}}"
    if kind == "string_type" and isinstance(found, int | float):
        message += " (put it in quotes)"
    if isinstance(found, str | int | float | bool) and f"{quoted(found)} " not in message:
        message += f", found {quoted(found)}"
    return message


def _not_supported(word: Any) -> str | None:
    """Return what there is in place of what a key or its value asks for; None where it asks for nothing of the kind."""
    plain = str(word).lower().replace("-", "_")
    return NOT_SUPPORTED.get(ALIKE.get(plain, plain))


def _locate(location: tuple[str | int, ...], schema: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], list[str]]:
    """Return what an error's location stands for.

    Returns:
        The dotted key, as the file writes it; the schema of its value; and the keys that are allowed beside it.
    """
    node, allowed, key = schema, list(schema["properties"]), ""
    for part in location:
        if part in node.get("discriminator", {}).get("mapping", {}):
            # pydantic's location has the union member that `name` selects; the file has no key for it.
            node = schema["$defs"][node["discriminator"]["mapping"][part].rpartition("/")[2]]
            continue
        key += f"[{part}]" if isinstance(part, int) else f".{part}"
        members = [
            schema["$defs"][ref.rpartition("/")[2]] for ref in node.get("discriminator", {}).get("mapping", {}).values()
        ]
        allowed = list(dict.fromkeys(name for one in (node, *members) for name in one.get("properties", {})))
        open_keys = node.get("additionalProperties")
        other = open_keys if isinstance(open_keys, Mapping) else {}
        node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, other)
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return key.removeprefix("."), node, allowed
