"""Run a sweep, or continue one: from its spec through its trials to the choice, the retraining and the test."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from multitask.cluster.ray_cluster import RayCluster
from multitask.cluster.session import ray_session
from multitask.job import Job, LoadedInputs
from multitask.job.models import load_backbone
from multitask.job.tables import open_split
from multitask.report.pages import write_sweep_report
from multitask.run.directory import RunError, write_json
from multitask.run.files import checked, read_json
from multitask.run.stopping import sigterm_as_ctrl_c
from multitask.run.tracking import Tracker
from multitask.spec.errors import SpecError
from multitask.spec.reading import dump_spec, load_spec
from multitask.spec.schema import JobSpec, TaskSpec, TrackingSpec
from multitask.spec.text import read_yaml, to_yaml
from multitask.sweep.figures import draw, series, write_figures
from multitask.sweep.final import TEST, Verdict, measure, read_verdict, retrained_spec, run_to_its_end, stopped
from multitask.sweep.outcomes import Choice, TrialOutcome, choices, choose, read_outcome, write_tables, write_winner
from multitask.sweep.places import reserve
from multitask.sweep.plan import TrialPlan, plan_trial, plan_trials
from multitask.sweep.spec import AshaScheduler, SweepSpec, dump_sweep, load_sweep
from multitask.sweep.summary import section
from multitask.sweep.tuning import run_trials
from patches import Backbone
from patches.files import write_atomic

SPEC, STATE = "sweep.yaml", "sweep.json"
SOURCE_BACKBONE = "source/export/backbone.safetensors"


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep."""

    directory: Path
    outcomes: tuple[TrialOutcome, ...]
    choice: Choice | None
    """The best setting, or None if there is no setting of which all trials have finished."""
    verdict: Verdict | None
    """The result on the test tables, or None if they were not read."""
    mlflow_run_id: str | None
    """MLflow's id of the sweep's run, or None if MLflow could not be reached."""


def run_sweep(
    source: str | Path | Mapping[str, Any] | SweepSpec,
    *,
    go_on: bool = False,
    mlflow_uri: str | None = None,
    console: Console | None = None,
) -> SweepResult:
    """Train every trial of a sweep and choose the best setting by validation.

    Args:
        source: a YAML file, a mapping, or a sweep spec.
        go_on: continue a sweep that stopped. Finished trials are not repeated, unfinished ones continue from their
            last checkpoint, and failed ones are tried again.
        mlflow_uri: the MLflow store that tracks the sweep; by default the one that its job names.
        console: where the live table is shown; standard error by default.
    Raises:
        SpecError, and the errors of patches and data: something does not fit; raised before anything starts.
        Stopped: Ctrl-C.
    """
    spec = source if isinstance(source, SweepSpec) else load_sweep(source)
    if mlflow_uri is not None:
        spec = replace(spec, job={**spec.job, "tracking": {**(spec.job.get("tracking") or {}), "uri": mlflow_uri}})
    console = console or Console(stderr=True)
    directory = spec.run_directory
    _check_directory(spec, directory, go_on)
    weights = str(directory / SOURCE_BACKBONE) if spec.source else None
    plans = [plan.with_absolute_paths() for plan in plan_trials(spec, weights)]
    loaded = _check_jobs(spec, plans)
    trials = spec.samples if spec.suggested else len(plans)
    with sigterm_as_ctrl_c(), ray_session():
        places = reserve([plan.spec for plan in plans], list(RayCluster().nodes().values()), spec.concurrent, trials)
        tracker = _make_tracker(spec, plans[0].spec.tracking, trials)
        tracking = replace(plans[0].spec.tracking, uri=tracker.tracking_uri)

        def ready(plan: TrialPlan) -> TrialPlan:
            return replace(plan, spec=replace(places.placed(plan.spec), tracking=tracking))

        plans = [ready(plan) for plan in plans]
        search = None
        if spec.suggested:
            from multitask.sweep.searcher import Suggestions  # imported here, because few sweeps need Optuna

            search = Suggestions(
                spec, lambda number, values: ready(plan_trial(spec, number, values, weights).with_absolute_paths())
            )
        write_atomic(directory / SPEC, to_yaml(dump_sweep(spec)).encode())
        with tracker:
            write_json(directory / STATE, {"mlflow_run_id": tracker.run_id})
            if spec.source is not None:
                _train_source(spec.source, directory / "source", tracker, tracking.experiment, console)
            verdict = read_verdict(directory)
            # Once the test tables have been read, no further trials run, so that the test cannot influence the choice.
            complete = verdict is not None or run_trials(
                spec, plans, search, loaded, places.concurrent, tracker.run_id, console
            )
            outcomes = tuple(read_outcome(plan) for plan in (plans if search is None else search.plans))
            return _conclude(spec, outcomes, complete, verdict, tracker, console)


def _conclude(
    spec: SweepSpec,
    outcomes: tuple[TrialOutcome, ...],
    complete: bool,
    verdict: Verdict | None,
    tracker: Tracker,
    console: Console,
) -> SweepResult:
    """Choose the best setting, retrain and test if the spec asks for it, and write tables, figures and report.

    Args:
        complete: whether all trials have ended.
        verdict: the result on the test tables, if an earlier start of the sweep has read them.
    Raises:
        Stopped: the sweep is not complete; raised after everything has been written.
    """
    directory, choice = spec.run_directory, choose(outcomes)
    write_json(directory / STATE, {"mlflow_run_id": tracker.run_id})  # perhaps MLflow could not be reached before
    if complete and choice is not None and verdict is None:
        verdict = _retrain_and_test(spec, choice, directory, tracker, console)
    if outcomes:
        _record(spec, directory, outcomes, choice, verdict, tracker)
    if not complete:
        raise stopped(directory)
    return SweepResult(directory, outcomes, choice, verdict, tracker.run_id)


def _check_directory(spec: SweepSpec, directory: Path, go_on: bool) -> None:
    """Check that a new sweep has an empty directory, and that a continued one has the spec that it began with."""
    if not go_on:
        if directory.exists() and any(directory.iterdir()):
            raise SpecError(
                f"'{directory}' is not empty. Continue the sweep in it (--resume; in Python go_on=True), name another "
                "one with `directory`, or remove it."
            )
    elif not (directory / SPEC).is_file():
        raise RunError(
            f"'{directory}' holds no sweep (no {SPEC}). Start it without --resume (in Python without go_on=True)."
        )
    elif read_yaml(directory / SPEC) != dump_sweep(spec):
        raise SpecError(
            f"The sweep in '{directory}' began with another spec than this one: compare {directory / SPEC}. Continue "
            "with that spec and with the --mlflow-uri (in Python mlflow_uri) that it began with, or name another "
            "`directory`."
        )


def _check_jobs(spec: SweepSpec, plans: Sequence[TrialPlan]) -> LoadedInputs:
    """Build each kind of job once, so that whatever does not fit is found before the first trial.

    Returns:
        What the trials share; without backbones if a source has to be trained first.
    """
    _check_milestone(spec, plans)
    tasks = [task for plan in plans for task in plan.spec.tasks]
    if any(task.train_on != "train" for task in tasks):
        raise SpecError(
            "tasks.train_on is 'train+validation', but a sweep chooses by validation; leave it out, and set `retrain: "
            "true` to have the chosen setting trained on both"
        )
    if any(plan.spec.workers is not None for plan in plans):
        raise SpecError(
            "the job has `workers`, which are divided among its tasks when it starts, but a sweep counts the places of "
            "each trial before that; leave the job's `workers` out, and give each task its own"
        )
    loaded = LoadedInputs()
    tested: dict[tuple[str, tuple[str, ...]], TaskSpec] = {}
    for kind in {_kind(plan.spec): plan.spec for plan in plans}.values():
        untrained = replace(kind, backbone=replace(kind.backbone, weights=None))
        job = Job(kind if spec.source is None else untrained, loaded=loaded)
        tested |= {(task.data, job.classes[task.name]): task for task in job.spec.tasks}
    if spec.test:
        for (_, classes), task in tested.items():
            open_split(task, "test", verify=False).in_classes(classes)
    if spec.source is None:
        return loaded
    _check_source(load_spec(spec.source), loaded.backbones.values())
    return LoadedInputs(tables=loaded.tables)


def _kind(spec: JobSpec) -> str:
    """Return a text that is equal for jobs with the same backbone, tasks and shared training."""
    content = dump_spec(spec)
    return json.dumps([content[key] for key in ("backbone", "train_shared", "tasks")])


def _check_source(source: JobSpec, backbones: Iterable[Backbone]) -> None:
    """Check that the backbone that the source trains fits the trials, so that it is not trained in vain."""

    def shapes(backbone: Backbone) -> dict[str, Any]:
        return {name: tensor.shape for name, tensor in backbone.network.state_dict().items()}

    trained = load_backbone(source, weights=None)
    for backbone in backbones:
        if shapes(backbone) != shapes(trained):
            raise SpecError(
                f"source '{source.name}' trains backbone {trained.name} {trained.options}, which does not fit the "
                f"trials' {backbone.name} {backbone.options}; give both the same backbone"
            )


def _check_milestone(spec: SweepSpec, plans: Sequence[TrialPlan]) -> None:
    """Check that the scheduler's first milestone comes before the end of a trial; otherwise it would stop none."""
    if not isinstance(spec.scheduler, AshaScheduler):
        return
    grace, jobs = spec.scheduler.grace_rounds, [plan.spec for plan in plans]
    # The scheduler decides at evaluations: at the first one that is not before its milestone.
    if all(math.ceil(grace / job.evaluate_every) * job.evaluate_every >= job.steps for job in jobs):
        raise SpecError(
            f"scheduler.grace_rounds is {grace}, but the trials have {jobs[0].steps} steps and are evaluated every "
            f"{jobs[0].evaluate_every}, so that none would be stopped early; set fewer rounds, evaluate more often, or "
            "leave the scheduler out"
        )


def _make_tracker(spec: SweepSpec, tracking: TrackingSpec, trials: int) -> Tracker:
    """Start the MLflow run of the sweep, or reopen the one of its earlier start."""
    state = spec.run_directory / STATE
    remedy = "Without this file the sweep goes on in a new MLflow run, so move it away."
    earlier = checked(dict[str, str], read_json(state, remedy), state, remedy) if state.exists() else {}
    assert tracking.uri is not None, "`plan_trials` has set it"
    return Tracker(
        tracking.uri,
        tracking.experiment,
        spec.name,
        params={"space": _space(spec), "trials": trials},
        tasks={},
        folder=spec.run_directory,
        send_later="the same command and --resume",
        spec_text=to_yaml(dump_sweep(spec)),
        resume_run_id=earlier.get("mlflow_run_id"),
    )


def _space(spec: SweepSpec) -> dict[str, Any]:
    """Return each key with its values, as MLflow's params show them."""
    return {
        key: {kind: values for kind, values in asdict(dimension).items() if values is not None}
        for key, dimension in spec.dimensions.items()
    }


def _train_source(source: str, directory: Path, tracker: Tracker, experiment: str, console: Console) -> None:
    """Train and export the source, from whose backbone the trials start, unless that is done already."""
    changes = {"directory": str(directory), "tracking": {"uri": tracker.tracking_uri, "experiment": experiment}}
    run_to_its_end(load_spec(source, changes), tracker, console).export("best")


def _retrain_and_test(
    spec: SweepSpec, choice: Choice, directory: Path, tracker: Tracker, console: Console
) -> Verdict | None:
    """Retrain the chosen setting, and read the test tables, each only if the spec asks for it."""
    retrained = None
    if spec.retrain:
        retrained = run_to_its_end(retrained_spec(choice, spec.name, directory), tracker, console)
    return measure(directory, choice, retrained) if spec.test else None


def _record(
    spec: SweepSpec,
    directory: Path,
    outcomes: Sequence[TrialOutcome],
    choice: Choice | None,
    verdict: Verdict | None,
    tracker: Tracker,
) -> None:
    """Write tables, figures, report and the chosen job's spec to the directory and to MLflow."""
    found = series(choices(outcomes))
    figures = draw(found)
    report = write_sweep_report(spec.name, section(outcomes, found, figures, choice, verdict), directory)
    files = [*write_tables(outcomes, directory), *write_figures(figures, directory), report]
    if choice is not None:
        files.append(write_winner(choice, spec.name, directory))
        tracker.log_metrics(None, {"best_validation_top1": choice.top1}, step=0)
    if verdict is not None:
        files.append(directory / TEST)
        tracker.log_metrics(None, {"test_top1": verdict.top1}, step=0)
    for file in files:
        tracker.log_artifact(file)
    for outcome in outcomes:
        if outcome.state == "lost" and outcome.mlflow_run_id is not None:
            tracker.end_lost(outcome.mlflow_run_id)
