"""Retraining and test after the choice, without Ray."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import multitask
from multitask.run.directory import evaluate_models
from multitask.sweep.final import measure, read_verdict, retrained_spec
from multitask.sweep.outcomes import Choice, choose
from multitask.sweep.plan import TrialPlan
from tests.multitask.sweep.conftest import MakeOutcome


def chosen(make_outcome: MakeOutcome, **changes: Any) -> Choice:
    choice = choose([make_outcome(3, 90.0, **changes)])
    assert choice is not None
    return choice


def test_the_retrained_job_differs_in_its_tables_its_place_and_its_evaluations(
    make_outcome: MakeOutcome, tmp_path: Path
) -> None:
    choice = chosen(make_outcome, rate=0.0123)

    spec = retrained_spec(choice, "rates", tmp_path)

    assert [task.train_on for task in spec.tasks] == ["train+validation"]
    assert (spec.name, spec.directory) == ("rates_retrained_0003", str(tmp_path / "retrained_0003"))
    assert spec.evaluate_every == spec.steps
    before = choice.trial.spec
    tasks = tuple(replace(task, train_on="train") for task in spec.tasks)
    same = {"name": before.name, "directory": before.directory, "evaluate_every": before.evaluate_every}
    assert replace(spec, tasks=tasks, **same) == before


@pytest.mark.parametrize(("again", "version"), [(False, "best"), (True, "last")])
def test_the_verdict_is_of_the_test_tables_and_is_kept(
    make_outcome: MakeOutcome, tmp_path: Path, again: bool, version: str
) -> None:
    choice = chosen(make_outcome)
    run = multitask.train(retrained_spec(choice, "rates", tmp_path) if again else choice.trial.spec)
    assert read_verdict(tmp_path) is None

    verdict = measure(tmp_path, choice, run if again else None)

    assert (verdict.trial, verdict.directory, verdict.version) == (3, str(run.directory), version)
    assert verdict.tasks == evaluate_models(run.models(verdict.version)[1], run.spec, "test")
    assert verdict.top1 == verdict.tasks["pets"]["top1"]
    assert read_verdict(tmp_path) == verdict


def test_two_choices_are_retrained_in_folders_of_their_own(make_outcome: MakeOutcome, tmp_path: Path) -> None:
    choice = chosen(make_outcome)
    other: TrialPlan = replace(choice.trial, number=4)

    folders = {retrained_spec(c, "rates", tmp_path).directory for c in (choice, replace(choice, trial=other))}

    assert len(folders) == 2
