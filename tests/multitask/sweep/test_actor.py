"""A trial runs from one evaluation to the next, without Ray."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import multitask
from multitask.job import LoadedInputs
from multitask.run.directory import write_json
from multitask.run.live import SILENT_S, STATUS
from multitask.spec.schema import JobSpec
from multitask.sweep.actor import TrialRun
from multitask.sweep.outcomes import failure_file, read_outcome
from multitask.sweep.plan import TrialPlan

MakeSpec = Callable[..., JobSpec]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MLflow store that all tests of this file share, because its first use takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def spec(make_spec: MakeSpec, store: str) -> JobSpec:
    return make_spec(tasks={"pets": {}}, steps=6, evaluate_every=2, train_shared=False, tracking={"uri": store})


@pytest.fixture
def plan(spec: JobSpec) -> TrialPlan:
    return TrialPlan(0, 0, {"optimizer.rate": 0.01}, spec)


def to_the_end(trial: TrialRun) -> list[dict[str, float]]:
    news = []
    while not news or "done" not in news[-1]:
        news.append(trial.next())
    return news


def test_a_trial_trains_as_a_job_alone_does_and_changes_nothing_that_is_shared(plan: TrialPlan, tmp_path: Path) -> None:
    loaded = LoadedInputs()
    loaded.add(plan.spec)
    (backbone,) = loaded.backbones.values()
    before = backbone.content_hash()

    news = to_the_end(TrialRun(plan, loaded, None))
    alone = multitask.train(replace(plan.spec, directory=str(tmp_path / "alone")))

    assert [told["round"] for told in news] == [2, 4, 6, 6]
    assert news[2]["validation_top1"] == alone.result["last"]["tasks"]["pets"]["top1"]
    found, expected = (load_file(folder / "last.safetensors") for folder in (plan.directory, alone.directory))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert backbone.content_hash() == before
    assert alone.result["trained_parameters"] < alone.result["parameters"]


def test_a_stopped_trial_tells_again_what_it_did_and_ends_with_the_bits_of_one_that_was_not_stopped(
    plan: TrialPlan, tmp_path: Path
) -> None:
    trial = TrialRun(plan, None, None)
    first = trial.next()
    # The evaluation is in the run directory when it is reported: a trial that is killed now reports it again.
    assert read_outcome(plan).curve == ((first["round"], first["validation_top1"]),)
    trial.stop()
    assert read_outcome(plan).state == "stopped"

    news = to_the_end(TrialRun(plan, None, None))

    assert news[0] == first
    assert [told["round"] for told in news] == [2, 4, 6, 6]
    assert read_outcome(plan).state == "finished"
    alone = multitask.train(replace(plan.spec, directory=str(tmp_path / "alone")))
    found, expected = (load_file(folder / "last.safetensors") for folder in (plan.directory, alone.directory))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_trial_goes_on_once_its_process_on_another_machine_counts_as_gone(plan: TrialPlan) -> None:
    trial = TrialRun(plan, None, None)
    trial.next()
    trial.stop()
    path = plan.directory / STATUS
    silent = {"state": "running", "host": "elsewhere", "updated": time.time() - SILENT_S + 3.0}
    write_json(path, json.loads(path.read_text()) | silent)
    assert read_outcome(plan).state == "running"

    news = to_the_end(TrialRun(plan, None, None))

    assert [told["round"] for told in news] == [2, 4, 6, 6]


def test_a_trial_goes_on_with_the_share_that_it_has_now(plan: TrialPlan) -> None:
    trial = TrialRun(plan, None, None)
    trial.next()
    trial.stop()
    share = replace(plan.spec, resources=replace(plan.spec.resources, cpus_per_worker=0.5))

    to_the_end(TrialRun(replace(plan, spec=share), None, None))

    assert multitask.Run(plan.directory).spec == share


def test_a_trial_that_is_stopped_at_what_it_did_before_trains_no_further(plan: TrialPlan) -> None:
    trial = TrialRun(plan, None, None)
    trial.next()
    trial.stop()
    checkpoints = sorted(plan.directory.glob("checkpoints/*"))

    again = TrialRun(plan, None, None)
    again.next()
    again.stop()

    assert read_outcome(plan).rounds == 2
    assert sorted(plan.directory.glob("checkpoints/*")) == checkpoints


def test_a_finished_trial_is_told_again_and_not_trained_again(plan: TrialPlan) -> None:
    news = to_the_end(TrialRun(plan, None, None))
    written = (plan.directory / "result.json").stat().st_mtime_ns

    again = to_the_end(TrialRun(plan, None, None))

    assert again == news
    assert (plan.directory / "result.json").stat().st_mtime_ns == written


def test_a_failed_trial_says_why_beside_its_directory(spec: JobSpec) -> None:
    # With this rate the loss is not finite after the first step.
    plan = TrialPlan(0, 0, {}, replace(spec, optimizer=replace(spec.optimizer, rate=1e30)))

    with pytest.raises(multitask.TrainingError, match="pets"):
        to_the_end(TrialRun(plan, None, None))

    outcome = read_outcome(plan)
    assert outcome.state == "failed"
    assert outcome.error is not None
    assert "pets" in outcome.error
    assert failure_file(plan).is_file()
