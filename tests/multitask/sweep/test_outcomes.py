"""Outcomes of trials, and the choice among them."""

import csv
import socket
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from multitask.run.directory import RunError, write_json
from multitask.spec.reading import load_spec
from multitask.sweep.figures import Point, draw, series, write_figures
from multitask.sweep.final import read_verdict
from multitask.sweep.outcomes import (
    TrialOutcome,
    choices,
    choose,
    failure_file,
    read_outcome,
    winning_spec,
    write_tables,
    write_winner,
)
from multitask.sweep.searcher import read_settings
from tests.multitask.sweep.conftest import MakeOutcome


def test_the_best_evaluation_counts_not_the_last(make_outcome: MakeOutcome) -> None:
    outcome = replace(make_outcome(0, 50.0), curve=((2, 80.0), (4, 70.0)))

    assert (outcome.top1, outcome.rounds) == (80.0, 4)


def test_the_highest_mean_over_seeds_is_chosen(make_outcome: MakeOutcome) -> None:
    outcomes = [
        make_outcome(number, top1, setting=number // 2)
        for number, top1 in enumerate((99.0, 61.0, 81.0, 83.0, 70.0, 70.0))
    ]

    choice = choose(outcomes)

    assert choice is not None
    assert (choice.trial.number, choice.top1, choice.trials) == (2, 82.0, 2)


@pytest.mark.parametrize("state", ["stopped", "failed", "lost", "running", "waiting"])
def test_a_setting_counts_once_all_its_trials_have_finished(make_outcome: MakeOutcome, state: str) -> None:
    outcomes = [
        make_outcome(0, 99.0, setting=0),
        make_outcome(1, 99.0, setting=0, state=state),
        make_outcome(2, 50.0, setting=1),
    ]

    choice = choose(outcomes)

    assert choice is not None
    assert choice.trial.number == 2
    assert choose(outcomes[:2]) is None


def test_of_equal_settings_the_one_that_trains_fewer_parameters_is_chosen(make_outcome: MakeOutcome) -> None:
    choice = choose([make_outcome(0, 90.0), make_outcome(1, 90.0, trained_parameters=10)])

    assert choice is not None
    assert choice.trial.number == 1


def test_accuracy_counts_before_parameters(make_outcome: MakeOutcome) -> None:
    choice = choose([make_outcome(0, 90.0, trained_parameters=10), make_outcome(1, 90.2, trained_parameters=1000)])

    assert choice is not None
    assert choice.trial.number == 1


def test_the_winners_file_is_its_job_with_another_name_and_place(make_outcome: MakeOutcome, tmp_path: Path) -> None:
    outcome = make_outcome(0, 90.0, rate=0.0123)
    choice = choose([outcome])
    assert choice is not None

    written = load_spec(write_winner(choice, "rates", tmp_path))

    assert (written.name, written.directory) == ("rates_best", str(tmp_path / "best"))
    assert replace(written, name=outcome.plan.spec.name, directory=outcome.plan.spec.directory) == outcome.plan.spec


def test_the_winner_does_not_go_on_from_its_trials_checkpoints(make_outcome: MakeOutcome, tmp_path: Path) -> None:
    choice = choose([make_outcome(0, 90.0)])
    assert choice is not None
    spec = choice.trial.spec
    checkpoints = replace(spec.checkpoints, uri="s3://bucket/checkpoints/0000")
    choice = replace(choice, trial=replace(choice.trial, spec=replace(spec, checkpoints=checkpoints)))

    assert winning_spec(choice, "rates", tmp_path).checkpoints.uri == "s3://bucket/checkpoints/best"


def test_the_tables_have_a_row_for_each_trial(make_outcome: MakeOutcome, tmp_path: Path) -> None:
    outcomes = [make_outcome(0, 90.0), make_outcome(1, 80.0, state="failed", error="broke, badly", seconds=None)]
    mixed = replace(outcomes[1].plan, values={"tasks.method": ["a"], "optimizer.rate": 1})

    write_tables([outcomes[0], replace(outcomes[1], plan=mixed)], tmp_path)

    rows = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    assert [row["trial"] for row in rows] == [0, 1]
    assert [row["validation_top1"] for row in rows] == [90.0, 80.0]
    assert [row["setting_rate"] for row in rows] == [0.1, 1.0]
    assert [row["setting_method"] for row in rows] == ["full", '["a"]']
    assert [row["error"] for row in rows] == [None, "broke, badly"]
    with (tmp_path / "trials.csv").open() as file:
        assert [(row["trial"], row["error"]) for row in csv.DictReader(file)] == [("0", ""), ("1", "broke, badly")]


def write_status(outcome: TrialOutcome, state: str) -> None:
    curves = {"pets": [(2, 40.0), (4, 60.0)], "cars": [(2, 50.0)]}
    tasks = {
        name: {"steps": 4, "curve": [{"step": s, "version": s, "top1": t} for s, t in curve]}
        for name, curve in curves.items()
    }
    about = {"name": "trial", "engine": "local", "mlflow_run_id": "f00d", "error": None}
    status = {**about, "state": state, "tasks": tasks}
    outcome.plan.directory.mkdir(parents=True)
    # The process of the trial was killed: no process has this number.
    writer = {"process": 2**30, "host": socket.gethostname(), "updated": 0.0}
    write_json(outcome.plan.directory / "status.json", {**status, **writer})


def test_a_trials_state_is_read_from_its_files(make_outcome: MakeOutcome) -> None:
    waiting, lost, failed, finished, stopped, cut = (make_outcome(number, 0.0) for number in range(6))
    write_status(lost, "running")
    write_status(finished, "finished")
    write_status(stopped, "stopped")
    write_status(cut, "finished")  # the process was killed before it could write its result
    failure_file(failed.plan).parent.mkdir(parents=True, exist_ok=True)
    failure_file(failed.plan).write_text("no such table")
    failure_file(finished.plan).write_text("at its first try")
    version = {"version": 4, "round": 4, "tasks": {}}
    result = {"last": version, "best": version, "trained_parameters": 7, "seconds": 2.5}
    write_json(finished.plan.directory / "result.json", result)

    found = [read_outcome(outcome.plan) for outcome in (waiting, lost, failed, finished, stopped, cut)]

    assert [outcome.state for outcome in found] == ["waiting", "lost", "failed", "finished", "stopped", "lost"]
    assert [outcome.error for outcome in found] == [None, None, "no such table", None, None, None]
    # One evaluation lacks a task, because the driver was killed while it wrote.
    assert found[1].curve == ((2, 45.0),)
    assert (found[3].trained_parameters, found[3].seconds, found[3].mlflow_run_id) == (7, 2.5, "f00d")


def test_damaged_files_of_a_sweep_are_named_with_what_to_do(make_outcome: MakeOutcome, tmp_path: Path) -> None:
    outcome = make_outcome(0, 50.0)
    write_status(outcome, "finished")
    write_json(outcome.plan.directory / "result.json", {"seconds": "long"})
    with pytest.raises(RunError, match=r"0000/result\.json' is damaged: 'last'.*Restore it"):
        read_outcome(outcome.plan)
    write_json(outcome.plan.directory / "status.json", [])
    with pytest.raises(RunError, match=r"0000/status\.json' is damaged.*multitask resume"):
        read_outcome(outcome.plan)

    (tmp_path / "test.json").write_text('{"trial": 0}')
    with pytest.raises(RunError, match=r"test\.json' is damaged: 'directory'.*reads the test tables again"):
        read_verdict(tmp_path)
    (tmp_path / "settings.json").write_text('[{"rate": 0.1}, 3]')
    with pytest.raises(RunError, match=r"settings\.json' is damaged: '1'.*Restore it"):
        read_settings(tmp_path / "settings.json")
    assert read_settings(tmp_path / "nothing.json") == []


def test_figures_show_each_methods_best_setting_at_each_rate(make_outcome: MakeOutcome, tmp_path: Path) -> None:
    outcomes = [
        make_outcome(0, 70.0, rate=0.1),
        make_outcome(1, 80.0, rate=0.1),
        make_outcome(2, 60.0, rate=0.01),
        make_outcome(3, 99.0, rate=0.5, state="stopped"),
        make_outcome(4, 50.0, method="last_layer", trained_parameters=10),
    ]

    found = series(choices(outcomes))

    assert found == {
        "full": [
            Point(rate=0.01, trained_parameters=100, top1=60.0),
            Point(rate=0.1, trained_parameters=100, top1=80.0),
        ],
        "last_layer": [Point(rate=0.1, trained_parameters=10, top1=50.0)],
    }
    files = write_figures(draw(found), tmp_path)
    assert {path.name for path in files} == {
        f"accuracy_{what}{theme}.png" for what in ("rate", "parameters") for theme in ("", "_dark")
    }
    for path in files:
        with Image.open(path) as image:
            assert image.width > 1000
    assert draw(series(choices(outcomes[3:4]))) == []
