"""Files of version 0.1 (`tests/data/v0_1/make.py`) are read by today's code, with the values that 0.1 computed."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import multitask
import patches
from multitask.cascade import CascadeModel, check, load_cascade, read_predictions
from multitask.data import DataError, open_table
from multitask.data.transforms import decode
from multitask.job.checkpoint import CheckpointStore
from multitask.run.directory import Run, RunError, evaluate_models, open_export
from multitask.run.live import read_status
from multitask.sweep.outcomes import choose, read_outcome
from multitask.sweep.plan import plan_trials
from multitask.sweep.spec import load_sweep
from tests.jobs.command import multitask as command

FILES = Path(__file__).parent / "data" / "v0_1"
TASKS = ["pets_8", "pets_12"]
ROWS = 40
REJECTED, REJECTED_CALLS = 2, 3
"""Counters of the stopped run, called `refused` and `turned_away` in its files."""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, which is the current folder, because the paths in them are relative."""
    folder = tmp_path / "v0_1"
    shutil.copytree(FILES, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    answers: dict[str, Any] = json.loads((FILES / "expected" / "answers.json").read_text())
    return answers


ROUNDING = {"rtol": 1e-3, "atol": 1e-5}
"""Version 0.1 ran on another kind of CPU, whose sums were rounded in another order."""
AFTER_STEPS = {"rtol": 1e-2, "atol": 5e-3}
"""After some steps of AdamW at rate 0.01, which moves a value whose gradient is next to zero by the sign of the
rounding. Steps without the optimiser's slots would differ by more."""


def test_the_table_is_read(files: Path) -> None:
    for split in ("train", "validation", "test"):
        table = open_table(str(files / "table" / split))
        assert table.classes == tuple(f"class {label}" for label in range(4))
        np.testing.assert_array_equal(table.labels(), np.arange(ROWS) % 4)


def test_the_models_of_a_run_give_the_metrics_of_then(files: Path, expected: dict[str, Any]) -> None:
    run = Run(files / "finished")
    _, models = run.models("best")

    for split, metrics in expected["metrics"].items():
        now = evaluate_models(models, run.spec, split, files / "again" / split)
        assert now == {task: pytest.approx(wanted) for task, wanted in metrics.items()}
        kept, again = (
            read_predictions(folder / split) for folder in (files / "finished" / "predictions", files / "again")
        )
        for task in TASKS:
            np.testing.assert_allclose(again.logits[task], kept.logits[task], **ROUNDING)
    assert {name: task["curve"] for name, task in run.result["tasks"].items()} == expected["curves"]


def test_an_export_without_the_tables_writes_nothing(files: Path) -> None:
    shutil.rmtree(files / "table")
    with pytest.raises(DataError, match="table/train"):
        Run(files / "finished").export(to=files / "again")
    assert not (files / "again").exists()


def test_the_bundles_load_verify_and_answer_as_then(files: Path, expected: dict[str, Any]) -> None:
    backbone, models = open_export(files / "finished" / "export")

    assert backbone.content_hash() == expected["backbone_hash"]
    x = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    for task in TASKS:
        patches.verify_bundle(files / "finished" / "export" / f"{task}.patch", backbone)
        models[task].eval()
    with torch.no_grad():
        logits = {task: models[task](x) for task in TASKS}
    torch.testing.assert_close(logits, load_file(files / "expected" / "bundle_logits.safetensors"), **ROUNDING)


def test_an_export_has_the_bytes_of_then(files: Path) -> None:
    then = files / "finished" / "export"

    now = Run(files / "finished").export("best", files / "again")

    assert now.backbone.read_bytes() == (then / "backbone.safetensors").read_bytes()
    for task, bundle in now.bundles.items():
        found, wanted = patches.inspect_bundle(bundle), patches.inspect_bundle(then / f"{task}.patch")
        assert found.payload_sha256 == wanted.payload_sha256
        assert (found.backbone, found.preprocessing, found.metrics) == (
            wanted.backbone,
            wanted.preprocessing,
            wanted.metrics,
        )


def test_a_checkpoint_has_its_counters_under_their_new_names(files: Path) -> None:
    checkpoint = CheckpointStore(str(files / "stopped" / "checkpoints"), keep=1).latest()

    assert checkpoint is not None
    assert checkpoint.progress.workers["pets_8/0"].rejected == REJECTED
    assert checkpoint.progress.rejected_calls == REJECTED_CALLS


def test_a_stopped_run_goes_on_to_the_values_of_then(files: Path) -> None:
    run = multitask.resume(files / "stopped")

    now, then = (load_file(files / path) for path in ("stopped/last.safetensors", "expected/resumed.safetensors"))
    torch.testing.assert_close(now, then, **AFTER_STEPS)
    assert run.result["tasks"]["pets_8"]["rejected_pushes"] == REJECTED
    assert run.result["rejected_calls"] == REJECTED_CALLS
    assert [point["step"] for point in run.result["tasks"]["pets_12"]["curve"]] == [6, 12]


def test_a_run_whose_head_is_larger_than_its_classes_is_refused_with_what_to_do(files: Path) -> None:
    path = files / "stopped" / "spec.yaml"
    path.write_text(path.read_text().replace("num_classes: 4", "num_classes: 5"))
    with pytest.raises(RunError, match=r"'pets_8' was begun with version 0\.1, with a head of 5 outputs for 4 classes"):
        multitask.resume(files / "stopped")


def test_the_status_of_a_run_has_its_counters_under_their_new_names(files: Path) -> None:
    assert read_status(files / "finished")["state"] == "finished"
    status = read_status(files / "stopped")

    assert (status["state"], status["engine"]) == ("stopped", "local")
    assert status["rejected_calls"] == REJECTED_CALLS
    assert status["tasks"]["pets_8"]["rejected"] == REJECTED
    shown = command("status", files / "stopped")
    assert shown.returncode == 0, shown.stderr
    assert f"{REJECTED_CALLS} pushes and joins" in shown.stdout


def test_a_cascade_answers_as_then(files: Path, expected: dict[str, Any]) -> None:
    package, wanted = files / "pets.cascade", expected["cascade"]
    table = open_table(str(files / "table" / "test"))
    images = [decode(torch.frombuffer(bytearray(table.row(row).image), dtype=torch.uint8)) for row in range(ROWS)]

    answers = CascadeModel.load(package)(images)

    assert answers.labels.tolist() == wanted["labels"]
    assert answers.stages.tolist() == wanted["stages"]
    assert answers.costs.tolist() == wanted["costs"]
    cascade = load_cascade(package)
    checked = check(cascade, read_predictions(files / "finished" / "predictions" / "test"), cascade.point())
    assert (checked.accuracy.mean, checked.mean_cost.mean) == (wanted["accuracy"], wanted["mean_cost"])


def test_the_trials_of_a_sweep_are_read(files: Path, expected: dict[str, Any]) -> None:
    plans = plan_trials(load_sweep(files / "sweep" / "sweep.yaml"))

    outcomes = [read_outcome(plan) for plan in plans]

    found = {
        "states": [outcome.state for outcome in outcomes],
        "top1": [outcome.top1 for outcome in outcomes],
        "trained_parameters": [outcome.trained_parameters for outcome in outcomes],
    }
    choice = choose(outcomes)
    assert choice is not None
    assert {**found, "choice": choice.trial.number} == expected["sweep"]
