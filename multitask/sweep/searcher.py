"""Settings that Optuna suggests while a sweep runs, through Ray Tune."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, TPESampler
from ray.tune.search.optuna import OptunaSearch

from multitask.run.directory import write_json
from multitask.run.files import checked, damaged, read_json
from multitask.spec.errors import quoted
from multitask.spec.text import read_anew
from multitask.sweep.actor import METRIC
from multitask.sweep.outcomes import read_outcome
from multitask.sweep.plan import TrialPlan
from multitask.sweep.spec import Dimension, OptunaSearcher, SweepSpec

SETTINGS = "settings.json"
"""File in the sweep's directory with the suggested settings, in the order of the trials."""
REMEDY = "Restore it from a copy, or start the sweep in a new directory."


class Suggestions(OptunaSearch):
    """Asks Optuna for a setting whenever Tune has room for a trial, and tells Optuna the results of trials.

    A continued sweep gets its earlier settings first, in their order, and their trials report their results again.
    """

    def __init__(self, spec: SweepSpec, plan: Callable[[int, Mapping[str, Any]], TrialPlan]) -> None:
        """Read the settings of an earlier start, and set up Optuna.

        Args:
            plan: makes a trial from its number and setting; an error that it raises ends the sweep.
        Raises:
            RunError: the file of the settings is damaged, or has a value that the space does not have.
        """
        assert isinstance(spec.searcher, OptunaSearcher)
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # the live table shows the trials
        self._plan, self._dimensions = plan, spec.dimensions
        self._file = spec.run_directory / SETTINGS
        self._settings = [
            self._known(number, values) for number, values in enumerate(read_settings(self._file), start=1)
        ]
        self._trials: dict[str, TrialPlan] = {}
        super().__init__(
            {key: _distribution(dimension) for key, dimension in spec.dimensions.items()},
            metric=METRIC,
            mode="max",
            points_to_evaluate=[self._point(values) for values in self._settings],
            sampler=NumberedSampler(spec.seed, spec.searcher.startup_trials),
        )

    @property
    def plans(self) -> list[TrialPlan]:
        """Trials of all settings that were suggested so far."""
        return [self._plan(number, values) for number, values in enumerate(self._settings)]

    def suggest(self, trial_id: str) -> dict[str, TrialPlan]:
        """Return the next trial, and write down its setting if it is a new one."""
        point = super().suggest(trial_id)
        assert point is not None
        number, values = len(self._trials), self._values(point)
        self._trials[trial_id] = self._plan(number, values)
        if number == len(self._settings):
            self._settings.append(values)
            write_json(self._file, self._settings)
        return {"plan": self._trials[trial_id]}

    def on_trial_result(self, trial_id: str, result: Any) -> None:
        """Ignore evaluations during a trial: Optuna learns a trial's best evaluation at the trial's end."""

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:  # noqa: ARG002
        """Tell Optuna a trial's best evaluation, not its last one, because the sweep also chooses by the best."""
        top1 = None if error else read_outcome(self._trials[trial_id]).top1
        super().on_trial_complete(trial_id, {METRIC: top1}, error)

    def save(self, checkpoint_path: str) -> None:
        """Create an empty file, because Tune wants one. It is never read: sweeps resume from their run directories."""
        Path(checkpoint_path).touch()

    def _known(self, number: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a setting of an earlier start with the values of the space.

        Raises:
            RunError: the space does not have one of them.
        """
        try:
            return {key: _named(dimension, values[key]) for key, dimension in self._dimensions.items()}
        except (KeyError, ValueError) as error:
            raise damaged(self._file, f"setting {number} does not fit the space: {error}", REMEDY) from error

    def _values(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Return the setting that one of Optuna's points stands for."""
        return {
            key: point[key] if dimension.log_uniform is not None else dimension.named[point[key]]
            for key, dimension in self._dimensions.items()
        }

    def _point(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return Optuna's point for a setting."""
        return {
            key: values[key] if dimension.log_uniform is not None else dimension.named.index(values[key])
            for key, dimension in self._dimensions.items()
        }


class NumberedSampler(BaseSampler):
    """Optuna's tree-structured Parzen estimator, seeded anew for each trial by the trial's number.

    A suggestion then depends on the seed and on the known results, but not on how often the sweep was stopped.
    """

    def __init__(self, seed: int, startup_trials: int) -> None:
        self._seed, self._startup_trials = seed, startup_trials

    def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:  # noqa: ARG002
        seed = int(np.random.SeedSequence((self._seed, trial.number)).generate_state(1)[0])
        self._tpe = TPESampler(seed=seed, n_startup_trials=self._startup_trials)

    def infer_relative_search_space(self, *about: Any) -> dict[str, BaseDistribution]:
        return self._tpe.infer_relative_search_space(*about)

    def sample_relative(self, *about: Any) -> dict[str, Any]:
        return self._tpe.sample_relative(*about)

    def sample_independent(self, *about: Any) -> Any:
        return self._tpe.sample_independent(*about)


def read_settings(path: Path) -> list[dict[str, Any]]:
    """Return the settings of an earlier start, in the order of the trials.

    Raises:
        RunError: the file is damaged.
    """
    return checked(list[dict[str, Any]], read_json(path, REMEDY), path, REMEDY) if path.exists() else []


def _named(dimension: Dimension, value: Any) -> Any:
    """Return a value that an earlier start has written down as the spec names it today.

    Raises:
        ValueError: the spec does not have it.
    """
    if dimension.log_uniform is not None:
        low, high = dimension.log_uniform
        if isinstance(value, int | float) and low <= value <= high:
            return value
    elif value in dimension.named:
        return value
    elif (today := read_anew(value)) in dimension.named:  # version 0.1 took 1e-3 for text
        return today
    raise ValueError(f"found {quoted(value)}")


def _distribution(dimension: Dimension) -> BaseDistribution:
    """Return Optuna's distribution of a key: a range, or the indices of values, because Optuna takes no mappings."""
    if dimension.log_uniform is not None:
        low, high = dimension.log_uniform
        return FloatDistribution(low, high, log=True)
    return CategoricalDistribution(range(len(dimension.named)))
