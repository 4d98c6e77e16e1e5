"""Reading job specs from YAML files or mappings, and writing them back."""

import copy
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from multitask.spec.errors import SpecError, quoted, shortened
from multitask.spec.explain import explain, joined, line_of
from multitask.spec.fields import from_home
from multitask.spec.recipes import fill_in
from multitask.spec.resolutions import expand
from multitask.spec.schema import JobSpec, TaskSpec
from multitask.spec.text import check_plain, read_yaml, to_yaml

Spec = TypeVar("Spec")


_ADAPTER, _TASK = TypeAdapter(JobSpec), TypeAdapter(TaskSpec)


def load_spec(source: str | Path | Mapping[str, Any] | JobSpec, overrides: Mapping[str, Any] | None = None) -> JobSpec:
    """Read and check a job spec.

    Args:
        source: a YAML file, a mapping with the content of such a file, or a JobSpec. In a file:
            - `base: OTHER.yaml` names another spec, whose keys this file adds to or replaces;
            - `task_defaults` holds keys for every task;
            - a list as a task's resolution stands for one task per entry (multitask/spec/resolutions.py);
            - relative data and weight paths start at the file's folder;
            - optimizer and schedule may be left out; they then come from the recipe of the tasks' patch method.
        overrides: keys that replace those of the source, nested like the spec.
    Raises:
        SpecError: a key is unknown or missing, or a value has the wrong type or is out of range. The message names the
            file, the key and what is allowed.
    """
    if isinstance(source, JobSpec):
        if not overrides:
            return source
        source = dump_spec(source)
    if isinstance(source, Mapping):
        where, raw = "job spec", dict(source)
        check_plain(raw, where)
    else:
        where, raw = str(source), _read_file(Path(from_home(str(source))))
    check_plain(overrides or {}, where)
    raw = _with_task_defaults(_merge(raw, overrides or {}), where)
    places: list[int] = []
    if isinstance(raw.get("tasks"), list):
        try:
            raw["tasks"], places = expand(raw["tasks"])
        except ValueError as error:
            raise SpecError(f"{shortened(where, 200)}: {error}") from None
    filled, gaps = fill_in(raw)
    return validated(_ADAPTER, filled, where, places, gaps)


def read_job(content: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Merge the base and the `task_defaults` of a job spec into it, without checking the result.

    Args:
        content: the content of a job spec's file.
        folder: the folder at which the base and relative data and weight paths start.
        where: the name of the file that has the content, with which error messages begin.
    Returns:
        The job spec as plain data.
    Raises:
        SpecError: the base cannot be read, or the `task_defaults` are no keys and values.
    """
    return _with_task_defaults(_with_base(copy.deepcopy(dict(content)), folder, where), where)


def validated(
    adapter: TypeAdapter[Spec],
    raw: Any,
    where: str,
    places: Sequence[int] = (),
    gaps: Mapping[str, str] | None = None,
) -> Spec:
    """Validate plain data and return it as a spec.

    Args:
        adapter: pydantic's adapter of the spec's class.
        where: the file's name, with which error messages begin.
        places: for each task, the index of the file's entry that it comes from (see `explain`).
        gaps: keys that the recipes leave open (see `fill_in`).
    Raises:
        SpecError: a key is unknown or missing, or a value has the wrong type or is out of range.
    """
    gaps, more = gaps or {}, 0
    lines = [line_of(where, key, text) for key, text in gaps.items() if text]
    try:
        spec = adapter.validate_python(raw)
    except ValidationError as error:
        found, more = explain(where, error, schema=_schema(adapter), places=places, gaps=gaps)
        lines = [*found, *lines]
    if lines:
        raise SpecError(joined(lines, more))
    return spec


@cache
def _schema(adapter: TypeAdapter[Any]) -> dict[str, Any]:
    return adapter.json_schema()


def load_task(path: Path) -> dict[str, Any]:
    """Read one task from a YAML file that has the keys of a job spec's task.

    Relative data paths start at the file's folder.

    Raises:
        SpecError: as for `load_spec`.
    """
    path = Path(from_home(str(path)))
    raw = {"tasks": [_read_file(path)]}
    _anchor_paths(raw, path.parent)
    return _TASK.dump_python(validated(_TASK, raw["tasks"][0], str(path)), mode="json")


def dump_spec(spec: JobSpec) -> dict[str, Any]:
    """Return the spec as plain data, which `load_spec` reads back as an equal spec."""
    return _ADAPTER.dump_python(spec, mode="json")


def dump_yaml(spec: JobSpec) -> str:
    """Return the spec as the text of a YAML file."""
    return to_yaml(dump_spec(spec))


def _read_file(path: Path, variants: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a file, with the files that it names as its base.

    Args:
        variants: files that lead to this one by their `base`.
    """
    return _with_base(read_yaml(path), path.parent, str(path), (*variants, os.path.realpath(path)))


def _with_base(raw: dict[str, Any], folder: Path, where: str, variants: tuple[str, ...] = ()) -> dict[str, Any]:
    """Merge a file's content into the spec that it names as its base."""
    _anchor_paths(raw, folder)
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise SpecError(line_of(where, "base", f"expected the name of a YAML file, found {quoted(base)}"))
    path = folder / from_home(base)
    if os.path.realpath(path) in variants:
        raise SpecError(
            line_of(where, "base", f"{quoted(base)} leads back to itself; name a spec that has another base")
        )
    return _merge(_read_file(path, variants), raw)


def _with_task_defaults(raw: dict[str, Any], where: str) -> dict[str, Any]:
    raw = dict(raw)
    defaults = raw.pop("task_defaults", None)
    if defaults is None:
        return raw
    if not isinstance(defaults, Mapping):
        raise SpecError(line_of(where, "task_defaults", f"expected keys and values, found {quoted(defaults)}"))
    if isinstance(raw.get("tasks"), list):
        raw["tasks"] = [_merge(defaults, task) if isinstance(task, Mapping) else task for task in raw["tasks"]]
    return raw


def _anchor_paths(raw: dict[str, Any], folder: Path) -> None:
    """Resolve relative data, cache and weight paths against the file's folder, so that they hold in any directory."""
    tasks = raw["tasks"] if isinstance(raw.get("tasks"), list) else []
    for holder, key in [
        (raw.get("backbone"), "weights"),
        *((holder, key) for holder in (raw.get("task_defaults"), *tasks) for key in ("data", "cache_features")),
    ]:
        value = holder.get(key) if isinstance(holder, dict) else None
        if isinstance(value, str) and value.startswith(("./", "../")):
            holder[key] = os.path.realpath(folder / value)


def _merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two mappings key by key.

    Nested mappings whose `name` differs are not merged: another optimizer does not inherit the options of the first.
    """
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        if (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("name", old.get("name")) == old.get("name")
        ):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged
