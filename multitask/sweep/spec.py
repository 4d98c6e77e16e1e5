"""The sweep spec: a job, and the values that a sweep tries for some of its keys."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from multitask.spec.errors import SpecError, quoted
from multitask.spec.explain import line_of
from multitask.spec.fields import STRICT, Count, Name, Number, PathText, Rate, Whole, from_home
from multitask.spec.reading import read_job, validated
from multitask.spec.text import check_plain, read_yaml


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Dimension:
    """The values of one key. Exactly one of the three fields is set."""

    grid: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """Values that are all used, each together with every value of every other grid."""
    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """Values of which one is drawn."""
    log_uniform: tuple[Rate, Rate] | None = None
    """Two numbers between which one is drawn, so that its logarithm is uniform."""

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> Self:
        if sum(kind is not None for kind in (self.grid, self.choice, self.log_uniform)) != 1:
            raise ValueError(
                "give exactly one of grid: [VALUES], choice: [VALUES], log_uniform: [LOW, HIGH], for example "
                "{grid: [0.01, 0.1]}"
            )
        if self.log_uniform is not None and self.log_uniform[0] >= self.log_uniform[1]:
            raise ValueError(
                f"log_uniform is {list(self.log_uniform)}, but the first number has to be below the second"
            )
        seen: set[str] = set()
        for value in self.grid or ():
            if json.dumps(value) in seen:
                raise ValueError(f"grid has {quoted(value)} twice; for trials with other seeds set repeats")
            seen.add(json.dumps(value))
        return self

    @property
    def drawn(self) -> bool:
        """Whether values are drawn at random."""
        return self.grid is None

    @property
    def named(self) -> tuple[Any, ...]:
        """The values that the spec names: all of them, or the two ends of a range."""
        return self.grid or self.choice or self.log_uniform or ()


RATE, TASK_BATCH, WEIGHT_DECAY = "optimizer.rate", "tasks.batch_size", "optimizer.weight_decay"
READY: dict[str, dict[str, Dimension]] = {
    # Mudrakarta et al., "K for the Price of 1", ICLR 2019, section 5: 0.0045 to 0.45 "by factors of 3". With factors of
    # exactly 3, the rates miss 0.45 and the paper's own 0.045; these are the nearest rates that include both.
    "k_for_1_rates": {RATE: Dimension(grid=(0.0045, 0.015, 0.045, 0.15, 0.45))},
    # Alini et al., "Parasite Networks", 2024, after "Visual Prompt Tuning". To be used with rate_rule: per_256_images.
    "parasite_grid": {
        RATE: Dimension(grid=(1e-4, 5e-4, 1e-3, 5e-3, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0)),
        WEIGHT_DECAY: Dimension(grid=(0.0, 1e-4, 1e-3, 1e-2)),
        TASK_BATCH: Dimension(grid=(32, 64, 128, 256, 384, 1024)),
    },
    # Tang, Fu and Wu, "Minimal Interaction Separated Tuning", CVPR 2025: three values up to the number of blocks. They
    # are missing in the paper's text; a third, two thirds and all of ViT-B/16's 12 blocks are the natural reading.
    "mist_k": {"tasks.options.k": Dimension(grid=(4, 8, 12))},
}
"""Name of a paper's space -> its keys with their values."""


MOST_TRIALS = 10_000
"""Largest number of trials of a sweep, whose directories have numbers of four digits."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NoScheduler:
    """No trial is stopped early."""

    name: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AshaScheduler:
    """Asynchronous successive halving: at each milestone a trial goes on if it is among the best so far.

    Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020, arXiv:1810.05934.
    """

    name: Literal["asha"]
    grace_rounds: Count
    """Round of the first milestone; the next ones are this times reduction, reduction², ..."""
    reduction: Annotated[Number, Field(gt=1)] = 3.0
    """A trial passes a milestone if it is among the best 1 / `reduction` of the trials that have come to it so far."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NoSearcher:
    """Every setting is known before the first trial starts."""

    name: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptunaSearcher:
    """Each setting is suggested while the sweep runs, based on the results of the trials before it.

    Source: the tree-structured Parzen estimator of Akiba et al., "Optuna", KDD 2019, arXiv:1907.10902.
    """

    name: Literal["optuna"]
    startup_trials: Count = 10
    """Number of random settings before the searcher uses what it has learned."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SweepSpec:
    """A sweep as its YAML file describes it."""

    name: Name
    """Name of the sweep and of its directory; with a number, also the name of each trial."""
    job: dict[str, Any]
    """A job spec; with `base: FILE` it states only what differs from another one."""
    space: dict[str, Dimension] = Field(default_factory=dict)
    """Key of the job -> its values. `tasks.KEY` is the key of every task, `tasks.NAME.KEY` that of the task NAME."""
    ready: tuple[Literal["k_for_1_rates", "parasite_grid", "mist_k"], ...] = ()
    """Names of papers' spaces to use; a key in `space` replaces the same key of a paper's space."""
    samples: Count = 1
    """Number of draws of all `choice` and `log_uniform` keys for each point of the grid; with a searcher, number of all
    trials."""
    repeats: Count = 1
    """Number of trials of each setting, with the job's seed, seed + 1, ...; the setting counts by their mean."""
    searcher: Annotated[NoSearcher | OptunaSearcher, Field(discriminator="name")] = NoSearcher()
    scheduler: Annotated[NoScheduler | AshaScheduler, Field(discriminator="name")] = NoScheduler()
    source: PathText | None = None
    """A job spec to train first; every trial starts from the backbone of its version that is best by validation."""
    concurrent: Count | None = None
    """Number of trials that run at the same time; by default as many as have room on the cluster."""
    retries: Annotated[Whole, Field(ge=0)] = 1
    """Number of times that a failed trial is started again, from its last checkpoint, before it counts as failed."""
    retrain: bool = False
    """After the choice, train the chosen setting once more on train and validation tables together."""
    test: bool = False
    """Evaluate the retrained models, or else those of the chosen trial, on the test tables, once."""
    seed: Annotated[Whole, Field(ge=0)] = 0
    """Seed of the draws and suggestions, and of the order in which trials start under a scheduler."""
    directory: PathText | None = None
    """Directory of everything that the sweep writes; runs/NAME by default."""

    @model_validator(mode="after")
    def _something_varies(self) -> Self:
        if not self.dimensions:
            raise ValueError("a sweep needs a key in space, for example optimizer.rate: {grid: [0.01, 0.1]}")
        return self

    @model_validator(mode="after")
    def _samples_are_drawn(self) -> Self:
        if self.suggested:
            if self.samples == 1:
                raise ValueError(
                    f"samples is 1, but it is the number of all trials with searcher {self.searcher.name}; set it, for "
                    "example samples: 20"
                )
        elif self.samples > 1 and not any(dimension.drawn for dimension in self.dimensions.values()):
            raise ValueError(
                f"samples is {self.samples}, but every key has a grid, so that nothing is drawn; set repeats for "
                "trials with other seeds"
            )
        return self

    @model_validator(mode="after")
    def _seeds_have_one_origin(self) -> Self:
        if self.repeats > 1 and "seed" in self.dimensions:
            raise ValueError(f"repeats is {self.repeats} and space has seed; leave one of them out")
        if self.repeats > 1 and self.suggested:
            raise ValueError(
                f"repeats is {self.repeats}, but searcher {self.searcher.name} makes one trial of each setting; leave "
                "repeats out, and run best.yaml with other seeds"
            )
        return self

    @model_validator(mode="after")
    def _its_trials_have_numbers(self) -> Self:
        points = math.prod(len(dimension.grid or (0,)) for dimension in self.dimensions.values())
        trials = self.samples * self.repeats * (1 if self.suggested else points)
        if trials > MOST_TRIALS:
            raise ValueError(
                f"the sweep has {quoted(trials)} trials, but at most {MOST_TRIALS:,} have numbers; use fewer values, "
                "samples or repeats"
            )
        return self

    @model_validator(mode="after")
    def _no_key_lies_within_another(self) -> Self:
        for key in self.dimensions:
            parts = key.split(".")
            outer = next((one for n in range(1, len(parts)) if (one := ".".join(parts[:n])) in self.dimensions), None)
            if outer is not None:
                raise ValueError(f"space has {outer} and its part {key}; write the part into the values of {outer}")
        return self

    @property
    def dimensions(self) -> dict[str, Dimension]:
        """Key -> its values, from the papers' spaces in `ready` and then from `space`."""
        ready = {key: values for name in self.ready for key, values in READY[name].items()}
        return {**ready, **self.space}

    @property
    def suggested(self) -> bool:
        """Whether a searcher suggests the settings while the sweep runs."""
        return isinstance(self.searcher, OptunaSearcher)

    @property
    def run_directory(self) -> Path:
        """Absolute path of the sweep's directory."""
        return Path(self.directory or f"runs/{self.name}").resolve()


_ADAPTER = TypeAdapter(SweepSpec)
OWN_KEYS = ("name", "directory")
"""Keys of a job that the sweep sets for each trial."""


def load_sweep(source: str | Path | Mapping[str, Any], folder: Path | None = None) -> SweepSpec:
    """Read and check a sweep spec. Its job is checked later, with the values of each trial, by `plan_trials`.

    Args:
        source: a YAML file, or its content as a mapping.
        folder: folder to which the relative paths of a mapping refer; by default the working directory.
    Raises:
        SpecError: a key is unknown or missing, or a value has a wrong type or is out of range; the message names file,
            key and what is allowed.
    """
    if isinstance(source, Mapping):
        where, raw, folder = "sweep spec", dict(source), folder or Path()
        check_plain(raw, where)
    else:
        path = Path(from_home(str(source)))
        where, raw, folder = str(path), read_yaml(path), path.parent
    spec = validated(_ADAPTER, raw, where)
    for key in OWN_KEYS:
        if key in spec.job:
            raise SpecError(line_of(where, f"job.{key}", "the sweep sets this key for each trial; leave it out"))
    job = read_job(spec.job, folder, where)
    _check_shape(job, where)
    training = spec.source
    if training is not None and training.startswith(("./", "../")):
        training = os.path.realpath(folder / training)
    return replace(spec, job=job, source=training)


def _check_shape(job: Mapping[str, Any], where: str) -> None:
    """Check what the values of a trial are put into. The rest of the job is checked with the values of each trial."""
    tasks = job.get("tasks")
    if tasks is not None and not (isinstance(tasks, list) and all(isinstance(task, dict) for task in tasks)):
        raise SpecError(line_of(where, "job.tasks", f"expected a list of keys and values, found {quoted(tasks)}"))
    for key in ("tracking", "checkpoints"):
        if job.get(key) is not None and not isinstance(job[key], dict):
            raise SpecError(line_of(where, f"job.{key}", f"expected keys and values, found {quoted(job[key])}"))
    if not isinstance(job.get("seed", 0), int):
        raise SpecError(line_of(where, "job.seed", f"expected a whole number, found {quoted(job['seed'])}"))


def dump_sweep(spec: SweepSpec) -> dict[str, Any]:
    """Return the sweep as plain data, equal for equal sweeps, with its job's base merged in and absolute paths."""
    return _ADAPTER.dump_python(spec, mode="json")
