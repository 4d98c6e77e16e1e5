"""Runs the trials with Ray Tune; their results are in their run directories."""

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
    parent_run_id: str | None,
    console: Console,
) -> bool:
    """Have Tune run every trial that has not ended, and return whether all of them came to their end.

    Args:
        plans: all trials; with `search`, trials that show everything that a trial may need.
        search: the searcher that suggests the trials, if the sweep has one.
        loaded: tables and backbones that the trials share.
        concurrent: number of trials that run at the same time.
        parent_run_id: the MLflow run of the sweep, if MLflow can be reached.
        console: where the live table is shown.
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
    with Board(spec.name, tuple(spec.dimensions), trials, outcomes, console) as board, quiet_tune():
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                search_alg=search,
                num_samples=1 if search is None else to_run,
                scheduler=_scheduler(asha, max(plan.steps for plan in plans)),
                max_concurrent_trials=concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=files.name,
                storage_path=str(files.parent),
                failure_config=tune.FailureConfig(max_failures=spec.retries),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[board, JsonLoggerCallback()],  # without a file of results Tune complains at its end
                verbose=0,
            ),
        )
        tuner.fit()
    return len(board.ended) == to_run


def start_order(outcomes: Sequence[TrialOutcome], scheduler_seed: int | None) -> list[int]:
    """Return the numbers of the trials that Tune has to run, in the order in which they start.

    Without a scheduler these are the unfinished trials. A scheduler compares trials, so it gets all of them: ended ones
    report their results again. They start in random order, because in a grid's order each method might be better than
    the methods before it, and all its trials would pass every milestone.

    Args:
        scheduler_seed: seed of the random order; None without a scheduler.
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
        stop_last_trials=False,  # a trial of full length ends by itself, and then writes its result
    )


@contextlib.contextmanager
def quiet_tune() -> Iterator[None]:
    """Turn off what Tune prints and logs, and restore signal handlers and environment at the end.

    Tune's loggers are off because MLflow has every result, its tracebacks because a sweep reports failures at its end,
    and its tables because the sweep has its own. Tune leaves its signal handlers behind, which would swallow the next
    Ctrl-C.
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
