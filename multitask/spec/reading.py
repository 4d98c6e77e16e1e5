"""Reading job specs from YAML files or mappings, and writing them back."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from multitask.spec.errors import SpecError
from multitask.spec.explain import explain
from multitask.spec.recipes import fill_in
from multitask.spec.resolutions import expand
from multitask.spec.schema import JobSpec, TaskSpec

Spec = TypeVar("Spec")


_ADAPTER = TypeAdapter(JobSpec)


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
    else:
        where, raw = str(source), _read_file(Path(source))
    raw = _with_task_defaults(_merge(raw, overrides or {}))
    places: list[int] = []
    try:
        if isinstance(raw.get("tasks"), list):
            raw["tasks"], places = expand(raw["tasks"])
        raw = fill_in(raw)
    except ValueError as error:
        raise SpecError(f"{where}: {error}") from None
    return validated(_ADAPTER, raw, where, places)


def read_job(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Merge the base and the `task_defaults` of a job spec into it, without checking the result.

    Args:
        content: the content of a job spec's file.
        folder: the folder at which the base and relative data and weight paths start.
    Returns:
        The job spec as plain data.
    Raises:
        SpecError: the base cannot be read.
    """
    return _with_task_defaults(_with_base(copy.deepcopy(dict(content)), folder))


def validated(adapter: TypeAdapter[Spec], raw: Any, where: str, places: Sequence[int] = ()) -> Spec:
    """Validate plain data and return it as a spec.

    Args:
        adapter: pydantic's adapter of the spec's class.
        where: the file's name, with which error messages begin.
        places: for each task, the index of the file's entry that it comes from (see `explain`).
    Raises:
        SpecError: a key is unknown or missing, or a value has the wrong type or is out of range.
    """
    try:
        return adapter.validate_python(raw)
    except ValidationError as error:
        raise SpecError(explain(where, error, schema=adapter.json_schema(), places=places)) from None


def load_task(path: Path) -> dict[str, Any]:
    """Read one task from a YAML file that has the keys of a job spec's task.

    Relative data paths start at the file's folder.

    Raises:
        SpecError: as for `load_spec`.
    """
    raw = {"tasks": [_read_file(path)]}
    _anchor_paths(raw, path.parent)
    try:
        task = TypeAdapter(TaskSpec).validate_python(raw["tasks"][0])
    except ValidationError as error:
        message = explain(str(path), error, schema=_ADAPTER.json_schema(), within=("tasks", 0))
        raise SpecError(message.replace("tasks[0].", "")) from None
    return TypeAdapter(TaskSpec).dump_python(task, mode="json")


def dump_spec(spec: JobSpec) -> dict[str, Any]:
    """Return the spec as plain data, which `load_spec` reads back as an equal spec."""
    return _ADAPTER.dump_python(spec, mode="json")


def dump_yaml(spec: JobSpec) -> str:
    """Return the spec as the text of a YAML file."""
    return yaml.safe_dump(dump_spec(spec), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the keys and values of a spec's file.

    Raises:
        SpecError: the file is missing, is not valid YAML, or has no mapping at its top level.
    """
    if not path.is_file():
        raise SpecError(f"Job spec '{path}' is not a file. Name a YAML file, for example one of jobs/specs/.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise SpecError(f"{path}: expected keys and values at the top, found {type(raw).__name__}.")
    return raw


def _read_file(path: Path) -> dict[str, Any]:
    return _with_base(read_yaml(path), path.parent)


def _with_base(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Merge a file's content into the spec that it names as its base."""
    _anchor_paths(raw, folder)
    base = raw.pop("base", None)
    return raw if base is None else _merge(_read_file(folder / base), raw)


def _with_task_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    raw = dict(raw)
    defaults = raw.pop("task_defaults", None) or {}
    if defaults and isinstance(raw.get("tasks"), list):
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
            holder[key] = str((folder / value).resolve())


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
