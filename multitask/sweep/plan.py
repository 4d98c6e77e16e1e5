"""The trials of a sweep. Without a searcher, all are known and checked before the first one starts."""

import copy
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from multitask.job import LoadedInputs
from multitask.job.epochs import with_steps
from multitask.run.mlflow_store import sqlite_uri
from multitask.run.paths import absolute
from multitask.spec.errors import SpecError, quoted, shortened
from multitask.spec.reading import dump_spec, load_spec
from multitask.spec.schema import JobSpec
from multitask.sweep.spec import Dimension, SweepSpec

SET_BY_SWEEP = ("name", "directory", "tracking")
"""Keys that the sweep sets for each trial; two trials that differ only in these keys are the same job."""


@dataclass(frozen=True)
class TrialPlan:
    """One training job of a sweep."""

    number: int
    setting: int
    """Number of the setting; trials of one setting differ only in their seed."""
    values: Mapping[str, Any]
    """Key of the space -> its value."""
    spec: JobSpec

    @property
    def directory(self) -> Path:
        """The trial's run directory."""
        return self.spec.run_directory

    @property
    def steps(self) -> int:
        """Number of steps of each worker of the trial."""
        assert self.spec.steps is not None, "`with_steps` has set it"
        return self.spec.steps

    def with_steps(self, loaded: LoadedInputs) -> "TrialPlan":
        """Return the plan with steps in place of epochs.

        Args:
            loaded: holds the training tables, under the paths that the plan has.
        Raises:
            SpecError: the steps do not fit the other keys of the setting.
        """
        try:
            return replace(self, spec=with_steps(self.spec, loaded.train_rows(self.spec)))
        except SpecError as error:
            raise SpecError(f"setting {shortened(describe(self.values))}: {error}") from None

    def with_absolute_paths(self) -> "TrialPlan":
        """Return the plan with the paths that its run will have, so that `LoadedInputs` finds what the trials share."""
        return replace(self, spec=absolute(self.spec))


def settings(spec: SweepSpec) -> list[dict[str, Any]]:
    """Return every point of the grid `samples` times, each time with newly drawn values of the other keys.

    Equal specs give equal settings in the same order.
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
    """Return the settings by which the space of a searcher is checked.

    The first setting has the first value of every key. Each further setting has another value of one key.
    """
    first = {key: dimension.named[0] for key, dimension in spec.dimensions.items()}
    others = [{key: value} for key, dimension in spec.dimensions.items() for value in dimension.named[1:]]
    return [first, *({**first, **other} for other in others)]


def plan_trials(spec: SweepSpec, weights: str | None = None) -> list[TrialPlan]:
    """Return the trials, setting by setting, each with a checked job spec; with a searcher, the trials of `edges`.

    Args:
        weights: file with which the backbones start; by default the job's own weights.
    Raises:
        SpecError: the job of a setting is wrong, or a key has no effect; the message names the setting and the key.
    """
    found = [values for values in (edges if spec.suggested else settings)(spec) for _ in range(spec.repeats)]
    plans = [plan_trial(spec, number, values, weights) for number, values in enumerate(found)]
    _check_differences(spec.name, plans)
    return plans


def plan_trial(spec: SweepSpec, number: int, values: Mapping[str, Any], weights: str | None = None) -> TrialPlan:
    """Return the trial of a number and a setting; arguments and errors are those of `plan_trials`."""
    setting, repeat = divmod(number, spec.repeats)
    directory = spec.run_directory
    raw = copy.deepcopy(spec.job)
    for key, value in values.items():
        set_key(raw, key, value)
    raw |= {"name": f"{spec.name}_{number:04d}", "directory": str(directory / "trials" / f"{number:04d}")}
    tracking = raw.get("tracking") or {}
    if isinstance(tracking, dict):
        raw["tracking"] = {**tracking, "uri": tracking.get("uri") or sqlite_uri(directory.parent / "mlflow.db")}
    if repeat:
        raw["seed"] = raw.get("seed", 0) + repeat
    if weights is not None:
        set_key(raw, "backbone.weights", weights)
    _part_checkpoints(raw, number)
    try:
        return TrialPlan(number, setting, values, load_spec(raw))
    except SpecError as error:
        raise SpecError(f"sweep '{spec.name}', setting {shortened(describe(values))}: {error}") from None


def set_key(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a key of a job, in dotted form, to a value; `tasks.KEY` sets the key of every task.

    Raises:
        SpecError: the job has no tasks, or a part of the key names something that has no keys of its own.
    """
    if not key.startswith("tasks."):
        _set_below(raw, key.split("."), value, key)
        return
    tasks = [task for task in raw.get("tasks") or [] if isinstance(task, dict)]
    rest = key.removeprefix("tasks.")
    named = [task for task in tasks if "name" in task and rest.startswith(f"{task['name']}.")]
    if not tasks:
        raise SpecError(f"space.{shortened(key)}: the job has no tasks")
    for task in named or tasks:
        path = rest.removeprefix(f"{task['name']}.") if named else rest
        _set_below(task, path.split("."), copy.deepcopy(value), key)


def describe(values: Mapping[str, Any]) -> str:
    """Format a setting in one line: `optimizer.rate=0.01, tasks.method=full`."""
    names = short_names(list(values))
    return ", ".join(f"{names[key]}={show(value)}" for key, value in values.items())


def show(value: Any) -> str:
    """Format a value of a setting for people, with at most four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return a short name for each key: its last part, or the whole key if another key ends in the same part."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def _check_differences(sweep: str, plans: Sequence[TrialPlan]) -> None:
    """Check that no two settings make the same job, because then a key has no effect, and the table would mislead."""
    made: dict[str, TrialPlan] = {}
    for plan in plans:
        job = dump_spec(plan.spec)
        job["checkpoints"]["uri"] = None
        other = made.setdefault(json.dumps([value for key, value in job.items() if key not in SET_BY_SWEEP]), plan)
        if other.values != plan.values:
            raise SpecError(
                f"sweep '{sweep}': the settings {shortened(describe(other.values))} and "
                f"{shortened(describe(plan.values))} are one and the same job, so a key of space has no effect. Either "
                "the sweep sets that key for all trials (name, directory, tracking, and backbone.weights if there is a "
                "source), or another key or the job's tasks replace it. Leave the key out."
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
            raise SpecError(
                f"space.{shortened(key)}: '{shortened(part)}' of the job is {quoted(node)}, which has no keys of its "
                "own"
            )
    node[path[-1]] = value


def _part_checkpoints(raw: dict[str, Any], number: int) -> None:
    """Give a trial a place of its own for checkpoints, so that trials do not read each other's."""
    checkpoints = raw.get("checkpoints")
    if isinstance(checkpoints, dict) and checkpoints.get("uri"):
        checkpoints["uri"] = f"{str(checkpoints['uri']).rstrip('/')}/{number:04d}"
