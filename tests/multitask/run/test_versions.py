"""Where a run ends early: the decision, what is left behind, and what a driver that is lost around it leaves."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import multitask
from multitask.engines import ENGINES, Driver, Outcome
from multitask.engines.interface import take
from multitask.job.checkpoint import CheckpointStore
from multitask.job.job import Job
from multitask.run.directory import RunError
from multitask.run.live import read_status
from multitask.run.trainer import train
from multitask.run.trial import Trial
from multitask.run.versions import early_stop
from multitask.server.messages import Evaluation, mean_top1
from multitask.server.parameter_server import CompleteSnapshot
from multitask.spec.schema import JobSpec
from multitask.sweep.actor import TrialRun
from multitask.sweep.outcomes import read_outcome
from multitask.sweep.plan import TrialPlan

MakeSpec = Callable[..., JobSpec]


@pytest.mark.parametrize(
    ("round_", "best_round", "first_round", "evaluations"),
    [
        (40, 20, 0, 2),
        (30, 20, 0, None),
        (50, 20, 0, 3),
        # A server that went back may evaluate rounds before the best one again.
        (20, 40, 0, None),
        # After the last step there is nothing to stop, also for a task that joined in round 10.
        (100, 20, 0, None),
        (100, 20, 10, 8),
        (110, 20, 10, None),
        # Where a loss let rounds jump, the evaluations that were due count.
        (41, 22, 0, 2),
    ],
)
def test_a_run_ends_after_that_many_evaluations_without_a_better_one(
    round_: int, best_round: int, first_round: int, evaluations: int | None
) -> None:
    spec = SimpleNamespace(evaluate_every=10, stop_after=2)
    job: Any = SimpleNamespace(spec=spec, steps=100, progress=SimpleNamespace(first_round={"a": 0, "b": first_round}))

    stop = early_stop(
        job, Evaluation(400 + round_, round_, {}, False, {}, server=1), {"round": best_round, "version": 7}
    )

    assert (None if stop is None else stop.evaluations) == evaluations
    assert stop is None or (stop.version, stop.round, stop.best_version) == (400 + round_, round_, 7)


def told(job: Job, round_: int, top1: float) -> Evaluation:
    metrics = {task.name: {"top1": top1, "top5": 100.0, "loss": 1.0} for task in job.spec.tasks}
    groups = {name: group.state() for name, group in job.groups.items()}
    return Evaluation(round_, round_, metrics, False, groups, server=1)


def test_what_the_engine_tells_after_the_end_is_no_part_of_the_run(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[bool, bool]] = []
    noted: list[int] = []

    def engine(job: Job, driver: Driver) -> Outcome:
        for batch in ([(2, 40.0), (4, 50.0)], [(6, 50.0)], [(8, 49.0), (10, 90.0)], [(12, 95.0)]):
            evaluations = [told(job, *one) for one in batch]
            driver.watch([], evaluations, job.progress)
            asked.append((driver.wants_pause(), driver.has_ended()))
        return Outcome(versions={"last": evaluations[-1], "best": evaluations[-1]}, paused=True)

    monkeypatch.setitem(ENGINES, "local", engine)
    trial = Trial(on_evaluation=lambda evaluation: noted.append(evaluation.round))
    run = train(make_spec(steps=20, stop_after=2), trial=trial)

    assert asked == [(False, False), (False, False), (True, True), (True, True)]
    assert (run.result["best"]["round"], run.result["last"]["round"]) == (4, 8)
    assert noted == [point["step"] for point in run.result["tasks"]["pets"]["curve"]] == [2, 4, 6, 8]
    expected = {"version": 8, "round": 8, "best_version": 4, "best_round": 4, "evaluations": 2}
    assert run.result["stopped_early"] == expected
    said = " ".join(capfd.readouterr().err.split())
    words = "Stops early, at round 8 of 20: in 2 evaluations the mean validation top-1 was not above the 50.00 % of"
    assert words in said


def test_no_checkpoint_is_saved_once_the_end_is_known(make_spec: MakeSpec, tmp_path: Path) -> None:
    """A driver that goes on from such a checkpoint would not make the evaluation again, and end later."""
    job, ended = Job(make_spec()), False
    saved = {name: group.state() for name, group in job.groups.items()}
    snapshot = CompleteSnapshot(job.progress, told(job, 8, 50.0), saved)
    news: Any = [], {8: snapshot}, job.progress

    def watch(_: object, evaluations: list[Evaluation], __: object) -> None:
        nonlocal ended
        ended = bool(evaluations)

    store = CheckpointStore(str(tmp_path / "kept"), keep=1)
    take(job, Driver(watch, store, has_ended=lambda: ended), Outcome(), news, lambda _: {})
    assert ended
    assert store.latest() is None
    take(job, Driver(watch, store), Outcome(), news, lambda _: {})
    assert store.latest() is not None


def test_a_run_and_a_trial_that_stop_early_have_finished(make_spec: MakeSpec) -> None:
    """At this rate no evaluation is better than the first one."""
    sgd = {"name": "sgd", "rate": 1e-12}
    spec = make_spec({"pets": {"method": "last_layer"}}, train_shared=False, optimizer=sgd, steps=30, stop_after=2)
    plan = TrialPlan(0, 0, {}, spec)
    trial, news = TrialRun(plan, None, None), [{}]
    while "done" not in news[-1]:
        news.append(trial.next())

    assert [told["round"] for told in news[1:]] == [2, 4, 6, 6]
    outcome = read_outcome(plan)
    assert (outcome.state, outcome.rounds) == ("finished", 6)
    run = multitask.Run(plan.directory)
    assert (run.result["best"]["round"], run.result["last"]["round"]) == (2, 6)
    assert news[-1]["validation_top1"] == mean_top1(run.result["last"]["tasks"].values())
    status = read_status(run.directory)
    assert (status["state"], status["error"]) == ("finished", None)
    assert 6 <= status["tasks"]["pets"]["made"] < 30
    with pytest.raises(RunError, match="has ended"):
        multitask.resume(run.directory)
