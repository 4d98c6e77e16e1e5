"""Start a sweep, or go on with one: Ray Tune runs the trials, the run directories keep what they did."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import tune
from ray.tune.logger import JsonLoggerCallback
from rich.console import Console

from multitask.engines.served import ray_session
from multitask.job import Job, Loaded
from multitask.runs import Run, RunError, write_json
from multitask.spec import SpecError, load_spec
from multitask.sweep.actor import METRIC, ROUND, TrialActor
from multitask.sweep.board import Board
from multitask.sweep.figures import write_figures
from multitask.sweep.outcomes import Choice, Outcome, choose, read_outcome, write_tables, write_winner
from multitask.sweep.places import Bundle, reserve, reserved
from multitask.sweep.plan import TrialPlan, plan_trials
from multitask.sweep.spec import AshaScheduler, SweepSpec, dump_sweep, load_sweep
from multitask.tracking import Tracker
from multitask.trainer import Stopped, Trial, resume, train
from patches.files import write_atomic

SPEC, STATE = "sweep.yaml", "sweep.json"
SOURCE_BACKBONE = "source/export/backbone.safetensors"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has found, and where."""

    directory: Path
    outcomes: tuple[Outcome, ...]
    choice: Choice | None
    """The best setting; None if no setting's trials have all finished."""
    mlflow_run_id: str


def run_sweep(
    source: str | Path | Mapping[str, Any] | SweepSpec,
    *,
    go_on: bool = False,
    mlflow_uri: str | None = None,
    console: Console | None = None,
) -> SweepResult:
    """Train every trial of a sweep and choose the best setting by validation.

    Args:
        source: a YAML file, a mapping, or a spec already built.
        go_on: take up a sweep that stopped; finished trials are not repeated, others go on from their last checkpoint
            and failed ones get another try.
        mlflow_uri: where the sweep is tracked, instead of what its job says.
        console: where the live table goes; standard error by default.
    Raises:
        SpecError and the errors of patches and data: before anything starts.
        Stopped: Ctrl-C.
    """
    spec = source if isinstance(source, SweepSpec) else load_sweep(source)
    if mlflow_uri is not None:
        spec = replace(spec, job={**spec.job, "tracking": {**(spec.job.get("tracking") or {}), "uri": mlflow_uri}})
    console = console or Console(stderr=True)
    directory = spec.run_directory
    _check_directory(spec, directory, go_on)
    plans = plan_trials(spec, str(directory / SOURCE_BACKBONE) if spec.source else None)
    loaded = _check_jobs(spec, plans)
    with ray_session():
        places = reserve([plan.spec for plan in plans], _nodes(), spec.concurrent)
        tracker = _make_tracker(spec, plans, directory)
        tracking = replace(plans[0].spec.tracking, uri=tracker.tracking_uri)
        plans = [
            replace(plan, spec=replace(placed, tracking=tracking))
            for plan, placed in zip(plans, places.specs, strict=True)
        ]
        write_atomic(directory / SPEC, _text(spec))
        with tracker:
            write_json(directory / STATE, {"mlflow_run_id": tracker.run_id})
            if spec.source is not None:
                _train_source(spec.source, directory / "source", tracker, tracking.experiment, console)
            complete = _run_trials(spec, plans, loaded, places.concurrent, tracker.run_id, console)
            outcomes = tuple(read_outcome(plan) for plan in plans)
            choice = choose(outcomes)
            _record(spec, directory, outcomes, choice, tracker)
            if not complete:
                raise Stopped(f"Stopped. Go on with the same command and --resume; everything is in {directory}")
    return SweepResult(directory, outcomes, choice, tracker.run_id)


def _check_directory(spec: SweepSpec, directory: Path, go_on: bool) -> None:
    """A sweep is taken up on request only, and only by the spec that it began with."""
    if not go_on:
        if directory.exists() and any(directory.iterdir()):
            raise SpecError(
                f"'{directory}' is not empty. Go on with the sweep in it (--resume), name another with `directory`, or "
                "remove it."
            )
    elif not (directory / SPEC).is_file():
        raise RunError(f"'{directory}' holds no sweep (no {SPEC}). Start it without --resume.")
    elif (directory / SPEC).read_bytes() != _text(spec):
        raise SpecError(
            f"The sweep in '{directory}' began with another spec than this one: compare {directory / SPEC}. Go on with "
            "that one, or name another `directory`."
        )


def _check_jobs(spec: SweepSpec, plans: Sequence[TrialPlan]) -> Loaded:
    """Build each kind of job once, on random weights: what does not fit is found before the first trial.

    Returns:
        The tables of all trials.
    """
    if spec.source is not None:
        load_spec(spec.source)
    built = Loaded()
    kinds = set()
    for plan in plans:
        job, backbone = plan.spec, plan.spec.backbone
        tasks = [[task.data, task.method, task.options, task.num_classes] for task in job.tasks]
        kind = json.dumps([backbone.name, backbone.num_classes, backbone.options, tasks])
        if kind not in kinds:
            kinds.add(kind)
            Job(replace(job, backbone=replace(backbone, weights=None), seed=plans[0].spec.seed), loaded=built)
    return Loaded(tables=built.tables)


def _make_tracker(spec: SweepSpec, plans: Sequence[TrialPlan], directory: Path) -> Tracker:
    """MLflow's run of the sweep, or the one of its earlier start."""
    tracking, state = plans[0].spec.tracking, directory / STATE
    assert tracking.uri is not None, "`plan_trials` has set it"
    return Tracker(
        tracking.uri,
        tracking.experiment,
        spec.name,
        params={"space": _space(spec), "trials": len(plans)},
        tasks={},
        spec_text=_text(spec).decode(),
        resume_run_id=json.loads(state.read_text())["mlflow_run_id"] if state.is_file() else None,
    )


def _space(spec: SweepSpec) -> dict[str, Any]:
    """Key -> its values, as MLflow's params show them."""
    return {
        key: {kind: values for kind, values in asdict(dimension).items() if values is not None}
        for key, dimension in spec.dimensions.items()
    }


def _text(spec: SweepSpec) -> bytes:
    return yaml.safe_dump(dump_sweep(spec), sort_keys=False).encode()


def _nodes() -> list[dict[str, float]]:
    """CPU and GPU of each living node."""
    return [
        {kind: node["Resources"].get(kind, 0.0) for kind in ("CPU", "GPU")} for node in ray.nodes() if node["Alive"]
    ]


def _train_source(source: str, directory: Path, tracker: Tracker, experiment: str, console: Console) -> None:
    """Train and export what the trials' backbone comes from, once."""
    changes = {"directory": str(directory), "tracking": {"uri": tracker.tracking_uri, "experiment": experiment}}
    nested = Trial(parent_run_id=tracker.run_id)
    if (directory / "result.json").is_file():
        run = Run(directory)
    elif (directory / "spec.yaml").is_file():
        run = resume(directory, console=console, trial=nested)
    else:
        run = train(load_spec(source, changes), console=console, trial=nested)
    run.export("best")


def _run_trials(
    spec: SweepSpec,
    plans: Sequence[TrialPlan],
    loaded: Loaded,
    concurrent: int,
    parent_run_id: str,
    console: Console,
) -> bool:
    """Have Tune run every trial that has not ended; returns whether all came to their end."""
    asha = spec.scheduler if isinstance(spec.scheduler, AshaScheduler) else None
    outcomes = [read_outcome(plan) for plan in plans]
    # A scheduler compares with trials that have ended, so those tell it again what they did.
    todo = [o.plan.number for o in outcomes if asha is not None or o.state != "finished"]
    if not todo:
        return True
    for plan in plans:
        loaded.add(plan.spec)
    bundles: dict[int, list[Bundle]] = {plan.number: reserved(plan.spec) for plan in plans}
    trainable = tune.with_parameters(TrialActor, plans=tuple(plans), loaded=loaded, parent_run_id=parent_run_id)
    trainable = tune.with_resources(trainable, lambda config: tune.PlacementGroupFactory(bundles[config["trial"]]))
    files = spec.run_directory / "tune"
    shutil.rmtree(files, ignore_errors=True)
    with Board(spec.name, outcomes, console) as board, _quiet_tune():
        tuner = tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search(todo)},
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
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
    return board.ended == set(todo)


def _scheduler(asha: AshaScheduler | None, steps: int) -> Any:
    if asha is None:
        return None
    return tune.schedulers.ASHAScheduler(
        time_attr=ROUND,
        max_t=max(steps, asha.grace_rounds),
        grace_period=asha.grace_rounds,
        reduction_factor=asha.reduction,
        stop_last_trials=False,  # a trial ends by itself, and writes its result
    )


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Without Tune's own loggers: MLflow has every result."""
    name = "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _record(
    spec: SweepSpec, directory: Path, outcomes: Sequence[Outcome], choice: Choice | None, tracker: Tracker
) -> None:
    """Tables, figures and the winner's spec, in the directory and in MLflow."""
    files = [*write_tables(outcomes, directory), *write_figures(outcomes, directory)]
    if choice is not None:
        files.append(write_winner(choice, spec.name, directory))
        tracker.log_metrics(None, {"best_validation_top1": choice.top1}, step=0)
    for file in files:
        tracker.log_artifact(file)
    for outcome in outcomes:
        if outcome.state == "lost" and outcome.mlflow_run_id is not None:
            tracker.end_lost(outcome.mlflow_run_id)
