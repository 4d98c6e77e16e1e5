"""A whole training with engine `local`: the content of the run directory, of MLflow and of the bundles."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

import multitask
import patches
from multitask.data import DataError, write_table
from multitask.engines import ENGINES, Driver, Outcome
from multitask.job.job import Job
from multitask.run.directory import Run, RunError, evaluate_models, open_export, write_json, write_spec
from multitask.run.live import LiveStatus, read_status
from multitask.run.mlflow_store import MlflowStore, TrackingError
from multitask.run.outbox import OUTBOX, Outbox
from multitask.run.records import Text
from multitask.run.tasks import read_tasks
from multitask.run.trainer import track
from multitask.server.messages import Evaluation
from multitask.spec.errors import SpecError
from multitask.spec.reading import dump_spec
from multitask.spec.schema import JobSpec
from tests.conftest import png

MakeSpec = Callable[..., JobSpec]


def test_a_run_leaves_its_spec_versions_result_and_mlflow_runs(make_spec: MakeSpec) -> None:
    spec = make_spec(steps=4, evaluate_every=2)

    run = multitask.train(spec)

    assert {path.name for path in run.directory.iterdir()} == {
        "spec.yaml",
        "tasks.json",
        "log.jsonl",
        "best.safetensors",
        "last.safetensors",
        "result.json",
        "status.json",
    }
    assert Run(run.directory).spec == spec
    assert run.result["last"]["version"] == 8
    assert [point["step"] for point in run.result["tasks"]["pets"]["curve"]] == [2, 4]
    assert run.result["tasks"]["cars"]["pushes"] == 4

    client = MlflowClient(f"sqlite:///{run.directory.parent}/mlflow.db")
    parent = client.get_run(run.result["mlflow_run_id"])
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {child.info.run_name for child in children} == {"pets", "cars"}
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    for child in children:
        for metric in ("loss", "rate", "staleness", "samples_per_s"):
            assert [point.step for point in client.get_metric_history(child.info.run_id, metric)] == [0, 1, 2, 3]
        assert len(client.get_metric_history(child.info.run_id, "validation_top1")) == 2
    assert parent.data.params["optimizer.name"] == "adamw"


def test_exported_bundles_give_the_trained_models_in_a_fresh_process(make_spec: MakeSpec) -> None:
    run = multitask.train(make_spec(steps=6, evaluate_every=3))
    export = run.export()
    trained = evaluate_models(run.models("best")[1], run.spec, "test")

    command = [sys.executable, "-m", "jobs.cli", "evaluate", str(run.directory), "--json"]
    fresh = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert fresh == trained
    backbone, models = open_export(export.backbone.parent)
    assert {path.name for path in export.backbone.parent.iterdir()} == {
        "backbone.safetensors",
        "cars.patch",
        "pets.patch",
    }
    for name, model in run.models("best")[1].items():
        assert all(
            torch.equal(tensor, models[name].network.state_dict()[key])
            for key, tensor in model.network.state_dict().items()
        )
        info = patches.verify_bundle(export.bundles[name], backbone)
        assert info.classes == [f"class {label}" for label in range(4)]
        assert info.preprocessing["resolution"] == 8
        assert info.metrics["validation_top1"] == run.result["best"]["tasks"][name]["top1"]


def test_best_and_last_differ_and_each_is_what_was_evaluated(make_spec: MakeSpec) -> None:
    """The validation metrics of the restored models equal those of the training, bit for bit."""
    run = multitask.train(make_spec(steps=9, evaluate_every=1, optimizer={"name": "sgd", "rate": 0.5}))
    assert run.result["best"]["version"] != run.result["last"]["version"]

    for version in ("best", "last"):
        _, models = run.models(version)
        assert evaluate_models(models, run.spec, "validation") == run.result[version]["tasks"]


def told(job: Job, version: int, top1: float) -> Evaluation:
    """Return an evaluation as a server reports it if it knows no better one."""
    metrics = {task.name: {"top1": top1, "top5": 100.0, "loss": 1.0} for task in job.spec.tasks}
    groups = {name: group.state() for name, group in job.groups.items()}
    return Evaluation(version, version, metrics, True, groups, server=1)


def test_a_server_that_went_back_to_a_checkpoint_takes_no_better_version_away(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine(job: Job, driver: Driver) -> Outcome:
        evaluations = [told(job, 300, 90.0), told(job, 252, 85.0)]
        for evaluation in evaluations:
            driver.watch([], [evaluation], job.progress)
        return Outcome(versions={"last": evaluations[-1]})

    monkeypatch.setitem(ENGINES, "local", engine)
    run = multitask.train(make_spec())
    assert (run.result["best"]["version"], run.result["last"]["version"]) == (300, 252)


def test_a_task_that_comes_back_is_another_one_and_best_is_chosen_anew(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec()
    cars = dump_spec(spec)["tasks"][1]
    cars["data"] = os.path.relpath(cars["data"])
    changes = [{"attach": None, "remove": "cars"}, {"attach": cars, "remove": None}]
    tops = iter([90.0, None, 50.0])

    def engine(job: Job, driver: Driver) -> Outcome:
        top1 = next(tops)
        evaluation = told(job, 1, top1 or 0.0)
        if top1 is not None:
            driver.watch([], [evaluation], job.progress)
        if changes:
            (spec.run_directory / "tasks.json").write_text("[")  # what somebody damages ends no run
            write_json(spec.run_directory / "requests" / "one.json", changes.pop(0))
            assert driver.wants_pause()
            driver.store.save(job.checkpoint(job.progress, evaluation.groups))
            return Outcome(paused=True)
        return Outcome(versions={"last": evaluation})

    monkeypatch.setitem(ENGINES, "local", engine)
    run = multitask.train(spec)
    assert run.result["best"]["tasks"] == run.result["last"]["tasks"]
    assert run.spec == spec  # with absolute paths
    assert read_tasks(run.directory).keys() == {"pets", "cars"}
    assert read_status(run.directory)["mlflow_task_runs"] == {"pets": 1, "cars": 2}


def test_a_finished_run_is_replaced_on_request_only(make_spec: MakeSpec) -> None:
    spec = make_spec(steps=1)
    first = multitask.train(spec)

    with pytest.raises(SpecError, match="holds a run"):
        multitask.train(spec)
    second = multitask.train(spec, overwrite=True)

    assert first.result["mlflow_run_id"] != second.result["mlflow_run_id"]


def test_a_folder_that_is_no_run_is_never_replaced(make_spec: MakeSpec) -> None:
    spec = make_spec(steps=1)
    spec.run_directory.mkdir(parents=True)
    (spec.run_directory / "thesis.tex").write_text("years of work")

    with pytest.raises(SpecError, match="holds other files"):
        multitask.train(spec, overwrite=True)

    assert (spec.run_directory / "thesis.tex").read_text() == "years of work"


def test_a_directory_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no finished run"):
        Run(tmp_path)
    with pytest.raises(RunError, match="multitask export"):
        open_export(tmp_path)


def test_a_failed_run_names_itself_and_is_marked_so_in_mlflow(make_spec: MakeSpec) -> None:
    spec = make_spec({"pets": {"std": [1e-38] * 3}})

    with pytest.raises(
        multitask.TrainingError, match=r"^Run 'job': Worker 'pets/0' of task 'pets' failed after 0 steps"
    ):
        multitask.train(spec)

    client = MlflowClient(f"sqlite:///{spec.run_directory.parent}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert {run.info.status for run in runs} == {"FAILED"}


def test_records_that_are_sent_in_two_parts_belong_to_one_mlflow_run(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec()
    write_spec(spec.run_directory / "spec.yaml", spec)
    LiveStatus(spec.run_directory).write({"name": "job", "state": "stopped", "engine": "local", "tasks": {}}, now=True)
    Outbox(spec.run_directory / OUTBOX).add(Text(name="one", text=""))

    def send(store: MlflowStore, _: object) -> None:
        store.runs[None] = "f00d"  # it has opened the run
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(MlflowStore, "send", send)
    with pytest.raises(TrackingError, match=r"1 records .* still wait .*nobody answers"):
        track(spec.run_directory)

    assert read_status(spec.run_directory)["mlflow_run_id"] == "f00d"
    (spec.run_directory / "spec.yaml").write_text("[")
    with pytest.raises(RunError, match=r"The run's spec cannot be read: .* its MLflow run keeps it"):
        track(spec.run_directory)


@pytest.mark.parametrize("spoilt", ["value", "metric"])
def test_a_run_never_finishes_with_numbers_that_are_not_finite(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    def engine(job: Job, driver: Driver) -> Outcome:
        evaluation = told(job, 8, 90.0)
        if spoilt == "metric":
            evaluation.metrics["cars"]["loss"] = float("nan")
        else:
            values = evaluation.groups["private:cars"].values.copy()
            values[0] = float("inf")
            evaluation.groups["private:cars"] = replace(evaluation.groups["private:cars"], values=values)
        driver.watch([], [evaluation], job.progress)
        return Outcome(versions={"last": evaluation})

    monkeypatch.setitem(ENGINES, "local", engine)
    spec = make_spec()
    found = "the validation metrics of task 'cars'" if spoilt == "metric" else r"tensor '[a-z0-9.]+' of task 'cars'"
    with pytest.raises(multitask.TrainingError, match=f"Version 8 .* NaN or infinity in {found}"):
        multitask.train(spec)
    assert not {"result.json", "best.safetensors", "last.safetensors"} & set(os.listdir(spec.run_directory))


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ({"method": "scale_bas"}, patches.PatchError, "scale_bias"),
        ({"options": {"statistic": "source"}}, patches.PatchError, "statistics"),
        ({"num_classes": 3}, SpecError, "4 classes.*3 outputs.*tasks.num_classes"),
        ({"num_classes": 5}, SpecError, "4 classes.*5 outputs.*tasks.num_classes"),
        ({"data": "no/such/folder"}, DataError, "no/such/folder"),
    ],
)
def test_what_does_not_fit_is_said_before_training(make_spec: MakeSpec, task: dict, error: type, message: str) -> None:
    spec = make_spec({"pets": task})

    with pytest.raises(error, match=message):
        multitask.train(spec)

    assert not spec.run_directory.exists()


def test_an_unknown_backbone_lists_near_names(make_spec: MakeSpec) -> None:
    with pytest.raises(patches.BackboneError, match="mobilenet_v2"):
        Job(make_spec(backbone={"name": "mobilenet_v3"}))


def test_a_shared_head_smaller_than_the_classes_is_named(make_spec: MakeSpec) -> None:
    spec = make_spec({"pets": {"method": "scale_bias", "num_classes": None}}, backbone={"num_classes": 2})

    with pytest.raises(SpecError, match=r"backbone\.num_classes"):
        Job(spec)


@pytest.mark.parametrize("undecodable", ["fail", "skip"])
def test_an_undecodable_image_fails_or_is_counted_and_named(
    make_spec: MakeSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture, undecodable: str
) -> None:
    rows = [(png(row, row % 4), row % 4) for row in range(16)]
    for split in ("train", "validation"):
        broken = [(b"no image", 3)] if split == "train" else []
        write_table(tmp_path / "data" / split, rows + broken, [f"class {label}" for label in range(4)])
    spec = make_spec({"pets": {"data": str(tmp_path / "data"), "undecodable": undecodable}}, steps=4)

    if undecodable == "fail":
        named = r"Worker 'pets/0' of task 'pets' failed after \d steps?: .*shard-00000\.parquet, row 16"
        with pytest.raises(multitask.TrainingError, match=named):
            multitask.train(spec)
    else:
        with caplog.at_level(logging.WARNING):
            assert multitask.train(spec).result["tasks"]["pets"]["skipped_images"] >= 1
        named = [record.getMessage() for record in caplog.records if "skips" in record.getMessage()]
        assert len(named) == 2
        assert re.search(r"Task 'pets' skips .*shard-00000\.parquet, row 16: the image cannot be decoded", named[0])
        assert re.search(r"Task 'pets' skips more than a tenth of class 'class 3': 1 of its 5 images", named[1])


def test_a_damaged_shard_ends_the_job_before_it_starts_unless_the_spec_says_otherwise(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    for split in ("train", "validation"):
        rows = [(png(row, row % 4), row % 4) for row in range(40)]
        write_table(tmp_path / "data" / split, rows, [f"class {label}" for label in range(4)], rows_per_shard=20)
    shard = tmp_path / "data/train/shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")

    def spec(**options: object) -> JobSpec:
        return make_spec({"pets": {"data": str(tmp_path / "data"), **options}}, steps=2)

    with pytest.raises(DataError, match=r"shard-00001\.parquet: found SHA-256"):
        multitask.train(spec())
    run = multitask.train(spec(damaged_shards="skip"))
    assert run.result["tasks"]["pets"]["pushes"] == 2
    assert set(run.export().bundles) == {"pets"}
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00001\.parquet: found no such file"):
        Job(spec(verify_data=False))


def test_workers_share_a_decode_where_they_read_the_same_rows_in_the_same_order(make_spec: MakeSpec) -> None:
    tasks = {
        "pets_8": {"resolution": 8, "workers": 2},
        "pets_12": {"resolution": 12, "workers": 2, "std": (0.1, 0.2, 0.3)},
        "pets_1": {"resolution": 8},
        "pets_5": {"resolution": 8, "workers": 2, "batch_size": 5},
        "pets_flip": {"resolution": 8, "workers": 2, "augment": "crop_flip"},
        "cars": {"workers": 2},
    }
    job = Job(make_spec(tasks))
    shared = [names for names in job.sharing(job.workers) if len(names) > 1]
    assert shared == [["pets_8/0", "pets_12/0"], ["pets_8/1", "pets_12/1"]]
