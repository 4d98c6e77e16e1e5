"""The trials of a sweep: known and checked before the first one starts, or suggested while it runs."""

import copy
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multitask.spec.errors import SpecError
from multitask.spec.reading import dump_spec, load_spec
from multitask.spec.schema import JobSpec
from multitask.sweep.spec import Dimension, SweepSpec

SET_BY_SWEEP = ("name", "directory", "tracking")
"""Keys of a job in which trials may differ without being other jobs."""


@dataclass(frozen=True)
class TrialPlan:
    """One training job of a sweep."""

    number: int
    setting: int
    """Trials of one setting differ in their seed alone."""
    values: Mapping[str, Any]
    """Key of the space -> its value."""
    spec: JobSpec

    @property
    def directory(self) -> Path:
        return self.spec.run_directory


def settings(spec: SweepSpec) -> list[dict[str, Any]]:
    """Every point of the grid, `samples` times, each with values of its own for what is drawn.

    The same spec gives the same settings in the same order.
    """
    dimensions = spec.dimensions
    grids = {key: dimension.grid for key, dimension in dimensions.items() if dimension.grid is not None}
    generator = random.Random(spec.seed)
    found = []
    for point in itertools.product(*grids.values()):
        on_grid = dict(zip(grids, point, strict=True))
        for _ in range(spec.samples):
            drawn = {key: _draw(dimension, generator) for key, dimension in dimensions.items() if dimension.drawn}
            found.append({key: {**on_grid, **drawn}[key] for key in dimensions})
    return found


def edges(spec: SweepSpec) -> list[dict[str, Any]]:
    """The first value of every key, then each other value in its turn: what a searcher's space is checked by."""
    first = {key: dimension.named[0] for key, dimension in spec.dimensions.items()}
    others = [{key: value} for key, dimension in spec.dimensions.items() for value in dimension.named[1:]]
    return [first, *({**first, **other} for other in others)]


def plan_trials(spec: SweepSpec, weights: str | None = None) -> list[TrialPlan]:
    """The trials, setting by setting, each with a job spec that was checked; with a searcher those of the edges.

    Args:
        weights: the file that their backbones start from; by default what the job says.
    Raises:
        SpecError: a setting's job is wrong, or a key has no effect; names the setting and the key.
    """
    found = [values for values in (edges if spec.suggested else settings)(spec) for _ in range(spec.repeats)]
    plans = [plan_trial(spec, number, values, weights) for number, values in enumerate(found)]
    _check_differences(spec.name, plans)
    return plans


def plan_trial(spec: SweepSpec, number: int, values: Mapping[str, Any], weights: str | None = None) -> TrialPlan:
    """The trial of a number, with the setting that it has; as `plan_trials`."""
    setting, repeat = divmod(number, spec.repeats)
    directory = spec.run_directory
    raw = copy.deepcopy(spec.job)
    for key, value in values.items():
        set_key(raw, key, value)
    raw |= {"name": f"{spec.name}_{number:04d}", "directory": str(directory / "trials" / f"{number:04d}")}
    tracking = raw.get("tracking") or {}
    raw["tracking"] = {**tracking, "uri": tracking.get("uri") or f"sqlite:///{directory.parent}/mlflow.db"}
    if repeat:
        raw["seed"] = raw.get("seed", 0) + repeat
    if weights is not None:
        set_key(raw, "backbone.weights", weights)
    _part_checkpoints(raw, number)
    try:
        return TrialPlan(number, setting, values, load_spec(raw))
    except SpecError as error:
        raise SpecError(f"sweep '{spec.name}', setting {describe(values)}: {error}") from None


def set_key(raw: dict[str, Any], key: str, value: Any) -> None:
    """Give a key of a job, in dotted form, a value; `tasks.KEY` gives it to every task.

    Raises:
        SpecError: the job has no such task, or something other than keys and values on the way.
    """
    if not key.startswith("tasks."):
        _set_below(raw, key.split("."), value, key)
        return
    tasks = [task for task in raw.get("tasks") or [] if isinstance(task, dict)]
    rest = key.removeprefix("tasks.")
    named = [task for task in tasks if rest.startswith(f"{task.get('name')}.")]
    if not tasks:
        raise SpecError(f"space.{key}: the job has no tasks")
    for task in named or tasks:
        path = rest.removeprefix(f"{task['name']}.") if named else rest
        _set_below(task, path.split("."), copy.deepcopy(value), key)


def describe(values: Mapping[str, Any]) -> str:
    """A setting in a line: `optimizer.rate=0.01, tasks.method=full`."""
    names = short_names(list(values))
    return ", ".join(f"{names[key]}={show(value)}" for key, value in values.items())


def show(value: Any) -> str:
    """A value of a setting for people: a drawn rate needs no sixteen digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Key -> its last part, where no other key ends in the same."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def _check_differences(sweep: str, plans: Sequence[TrialPlan]) -> None:
    """Settings that make one and the same job have a key without effect: the sweep's table would tell untruths."""
    made: dict[str, TrialPlan] = {}
    for plan in plans:
        job = dump_spec(plan.spec)
        job["checkpoints"]["uri"] = None
        other = made.setdefault(json.dumps([value for key, value in job.items() if key not in SET_BY_SWEEP]), plan)
        if other.values != plan.values:
            raise SpecError(
                f"sweep '{sweep}': the settings {describe(other.values)} and {describe(plan.values)} are one and the "
                "same job. A key of space has no effect there, as the sweep sets it for all trials (name, directory, "
                "tracking, with a source backbone.weights), or as another key or the job's tasks replace it."
            )


def _draw(dimension: Dimension, generator: random.Random) -> Any:
    if dimension.choice is not None:
        return generator.choice(dimension.choice)
    assert dimension.log_uniform is not None
    low, high = dimension.log_uniform
    return min(max(math.exp(generator.uniform(math.log(low), math.log(high))), low), high)


def _set_below(node: dict[str, Any], path: Sequence[str], value: Any, key: str) -> None:
    for part in path[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise SpecError(f"space.{key}: '{part}' of the job is {node!r}, which has no keys of its own")
    node[path[-1]] = value


def _part_checkpoints(raw: dict[str, Any], number: int) -> None:
    """Trials that save to one place would read each other's checkpoints."""
    checkpoints = raw.get("checkpoints")
    if isinstance(checkpoints, dict) and checkpoints.get("uri"):
        checkpoints["uri"] = f"{str(checkpoints['uri']).rstrip('/')}/{number:04d}"
