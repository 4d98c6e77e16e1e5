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
        source: a YAML file, the same as a mapping, or a spec already built. In a file, `base: OTHER.yaml` names a spec
            that this one changes, `task_defaults` holds keys for every task, a list as a task's resolution makes one
            task of each (multitask/spec/resolutions.py), and relative data and weight paths start at the file's folder.
            Optimiser and schedule may be left to the recipe of the tasks' method.
        overrides: keys that replace the source's, nested like the spec.
    Raises:
        SpecError: unknown or missing keys, wrong types or values out of range; names file, key and what is allowed.
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
    """What a job spec's file says, or would say, as plain data and unchecked: its base and `task_defaults` merged in.

    Args:
        content: of the file.
        folder: where the base and relative data and weight paths start.
    Raises:
        SpecError: the base cannot be read.
    """
    return _with_task_defaults(_with_base(copy.deepcopy(dict(content)), folder))


def validated(adapter: TypeAdapter[Spec], raw: Any, where: str, places: Sequence[int] = ()) -> Spec:
    """Plain data as a spec.

    Args:
        where: what errors begin with.
        places: of each task the number of the entry in the file that it comes from, where they differ.
    Raises:
        SpecError: unknown or missing keys, wrong types or values out of range.
    """
    try:
        return adapter.validate_python(raw)
    except ValidationError as error:
        raise SpecError(explain(where, error, schema=adapter.json_schema(), places=places)) from None


def load_task(path: Path) -> dict[str, Any]:
    """One task from a YAML file, with the keys of a job spec's task; relative data paths start at the file's folder.

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
    """The spec as plain data that `load_spec` reads back to an equal spec."""
    return _ADAPTER.dump_python(spec, mode="json")


def dump_yaml(spec: JobSpec) -> str:
    return yaml.safe_dump(dump_spec(spec), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a spec's file.

    Raises:
        SpecError: it is missing or no such YAML.
    """
    if not path.is_file():
        raise SpecError(f"Job spec '{path}' is not a file. Name a YAML file, for example one of jobs/specs/.")
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise SpecError(f"{path}: expected keys and values at the top, found {type(raw).__name__}.")
    return raw


def _read_file(path: Path) -> dict[str, Any]:
    return _with_base(read_yaml(path), path.parent)


def _with_base(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A file's content, merged into the spec that it names as its base."""
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
    """Relative data, cache and weight paths in a file start at the file's folder, wherever the command runs."""
    tasks = raw["tasks"] if isinstance(raw.get("tasks"), list) else []
    for holder, key in [
        (raw.get("backbone"), "weights"),
        *((holder, key) for holder in (raw.get("task_defaults"), *tasks) for key in ("data", "cache_features")),
    ]:
        value = holder.get(key) if isinstance(holder, dict) else None
        if isinstance(value, str) and value.startswith(("./", "../")):
            holder[key] = str((folder / value).resolve())


def _merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key, unless `name` differs: another optimiser takes none of the first one's options."""
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
