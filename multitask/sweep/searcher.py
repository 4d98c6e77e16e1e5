"""Settings that Optuna suggests while a sweep runs, through Ray Tune."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, TPESampler
from ray.tune.search.optuna import OptunaSearch

from multitask.run.directory import write_json
from multitask.sweep.actor import METRIC
from multitask.sweep.outcomes import read_outcome
from multitask.sweep.plan import TrialPlan
from multitask.sweep.spec import Dimension, OptunaSearcher, SweepSpec

SETTINGS = "settings.json"
"""In the sweep's directory: what was suggested, in the order of the trials."""


class Suggestions(OptunaSearch):
    """Asks Optuna for a setting whenever Tune has room for a trial, and tells it what trials found.

    A sweep that goes on gets its earlier settings first, in their order; their trials tell again what they did.
    """

    def __init__(self, spec: SweepSpec, plan: Callable[[int, Mapping[str, Any]], TrialPlan]) -> None:
        """Args:
        plan: makes the trial of a number and its setting; what it raises ends the sweep.
        """
        assert isinstance(spec.searcher, OptunaSearcher)
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # the live table tells of trials
        self._plan, self._dimensions = plan, spec.dimensions
        self._file = spec.run_directory / SETTINGS
        self._settings: list[dict[str, Any]] = json.loads(self._file.read_text()) if self._file.is_file() else []
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
        """The trials of all settings so far."""
        return [self._plan(number, values) for number, values in enumerate(self._settings)]

    def suggest(self, trial_id: str) -> dict[str, TrialPlan]:
        point = super().suggest(trial_id)
        assert point is not None
        number, values = len(self._trials), self._values(point)
        self._trials[trial_id] = self._plan(number, values)
        if number == len(self._settings):
            self._settings.append(values)
            write_json(self._file, self._settings)
        return {"plan": self._trials[trial_id]}

    def on_trial_result(self, trial_id: str, result: Any) -> None:
        """What counts is known at a trial's end."""

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:  # noqa: ARG002
        """Its best evaluation is what the choice goes by, not its last."""
        top1 = None if error else read_outcome(self._trials[trial_id]).top1
        super().on_trial_complete(trial_id, {METRIC: top1}, error)

    def save(self, checkpoint_path: str) -> None:
        """Nobody restores it, as sweeps resume from their run directories; Tune wants a file."""
        Path(checkpoint_path).touch()

    def _values(self, point: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: point[key] if dimension.log_uniform is not None else dimension.named[point[key]]
            for key, dimension in self._dimensions.items()
        }

    def _point(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: values[key] if dimension.log_uniform is not None else dimension.named.index(values[key])
            for key, dimension in self._dimensions.items()
        }


class NumberedSampler(BaseSampler):
    """Optuna's TPE, seeded by the number of the trial.

    So a suggestion depends on the seed and on what is known, and not on how often the sweep was stopped.
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


def _distribution(dimension: Dimension) -> BaseDistribution:
    """Of the values' places among their like, where they are named: Optuna takes no mappings."""
    if dimension.log_uniform is not None:
        low, high = dimension.log_uniform
        return FloatDistribution(low, high, log=True)
    return CategoricalDistribution(range(len(dimension.named)))
