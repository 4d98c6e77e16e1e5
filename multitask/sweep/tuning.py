"""Ray Tune runs the trials; their run directories keep what they did."""

import contextlib
import os
import random
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler
from rich.console import Console

from multitask.job import LoadedInputs
from multitask.sweep.actor import METRIC, ROUND, TrialActor
from multitask.sweep.board import Board
from multitask.sweep.outcomes import TrialOutcome, read_outcome
from multitask.sweep.places import reserved
from multitask.sweep.plan import TrialPlan
from multitask.sweep.spec import AshaScheduler, SweepSpec

if TYPE_CHECKING:
    from multitask.sweep.searcher import Suggestions


def run_trials(
    spec: SweepSpec,
    plans: Sequence[TrialPlan],
    search: "Suggestions | None",
    loaded: LoadedInputs,
    concurrent: int,
    parent_run_id: str,
    console: Console,
) -> bool:
    """Have Tune run every trial that has not ended; returns whether all came to their end.

    Args:
        plans: all trials, or with `search` those that show what its trials may need.
        search: suggests the trials.
    """
    asha = spec.scheduler if isinstance(spec.scheduler, AshaScheduler) else None
    outcomes = [read_outcome(plan) for plan in (plans if search is None else search.plans)]
    if search is None:
        todo = [plans[number] for number in start_order(outcomes, None if asha is None else spec.seed)]
        trials, to_run, space = len(plans), len(todo), {"plan": tune.grid_search(todo)}
    else:
        trials, to_run, space = spec.samples, spec.samples, {}
    if not to_run:
        return True
    for plan in plans:
        loaded.add(plan.spec)
    trainable = tune.with_parameters(TrialActor, loaded=loaded, parent_run_id=parent_run_id)
    trainable = tune.with_resources(trainable, lambda config: tune.PlacementGroupFactory(reserved(config["plan"].spec)))
    files = spec.run_directory / "tune"
    shutil.rmtree(files, ignore_errors=True)
    with Board(spec.name, tuple(spec.dimensions), trials, outcomes, console) as board, _quiet_tune():
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                search_alg=search,
                num_samples=1 if search is None else to_run,
                scheduler=_scheduler(asha, max(plan.spec.steps for plan in plans)),
                max_concurrent_trials=concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=files.name,
                storage_path=str(files.parent),
                failure_config=tune.FailureConfig(max_failures=spec.retries),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[board, JsonLoggerCallback()],  # Tune misses its results without a file of them
                verbose=0,
            ),
        )
        tuner.fit()
    return len(board.ended) == to_run


def start_order(outcomes: Sequence[TrialOutcome], scheduler_seed: int | None) -> list[int]:
    """The trials that Tune has to run, by their numbers.

    Args:
        scheduler_seed: with a scheduler, which compares trials: those that have ended tell it again what they did, and
            all come in random order, as in a grid's order whole methods may each be better than those before them,
            and pass every milestone.
    """
    if scheduler_seed is None:
        return [outcome.plan.number for outcome in outcomes if outcome.state != "finished"]
    numbers = [outcome.plan.number for outcome in outcomes]
    return random.Random(scheduler_seed).sample(numbers, len(numbers))


def _scheduler(asha: AshaScheduler | None, steps: int) -> Any:
    if asha is None:
        return None
    return ASHAScheduler(
        time_attr=ROUND,
        max_t=steps,
        grace_period=asha.grace_rounds,
        reduction_factor=asha.reduction,
        stop_last_trials=False,  # a trial ends by itself, and writes its result
    )


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Without Tune's own loggers, as MLflow has every result, its traces, as a sweep tells of failures at its end, and
    its tables.

    Tune leaves its handlers of signals behind; they would swallow the next Ctrl-C.
    """
    quiet = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0", "RAY_AIR_NEW_OUTPUT": "0"}
    before = {name: os.environ.get(name) for name in quiet}
    numbers = (signal.SIGINT, signal.SIGUSR1) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    os.environ.update(quiet)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
