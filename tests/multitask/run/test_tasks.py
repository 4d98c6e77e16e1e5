"""A run keeps what its tasks began with: nobody needs its tables later, and their class order may change."""

import logging
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import patches
from multitask.cascade import read_predictions
from multitask.data import DataError
from multitask.job.job import Job
from multitask.job.models import attach_task
from multitask.run.directory import Run, RunError, evaluate_models, open_export
from multitask.run.tasks import read_tasks, record_of, write_tasks
from multitask.run.trainer import Stopped, Trial, resume, train
from multitask.spec.schema import JobSpec
from tests.conftest import CLASSES, run_engine, write_named

MakeSpec = Callable[..., JobSpec]
OTHER = ["class 2", "class 0", "class 3", "class 1"]
SPLITS = ("train", "validation", "test")


def write(folder: Path, classes: list[str]) -> None:
    """Write the tables of a task anew, with equal images."""
    shutil.rmtree(folder, ignore_errors=True)
    for number, split in enumerate(SPLITS):
        write_named(folder / split, classes, seed=100 * number)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "data", CLASSES)
    return tmp_path / "data"


def test_tables_of_another_class_order_change_no_result(
    make_spec: MakeSpec, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are written anew while the run is stopped, once more after its end, and are removed at last."""
    spec = make_spec({"pets": {"data": str(data)}}, steps=8, evaluate_every=8)
    undisturbed = Job(spec)
    ran = run_engine(undisturbed)
    asked = count()
    with pytest.raises(Stopped):
        train(spec, trial=Trial(wants_stop=lambda: next(asked) >= 3))
    write(data, OTHER)

    with caplog.at_level(logging.WARNING):
        run = resume(spec.run_directory)

    assert [split for split in SPLITS if f"its {split} table is not the one that" in caplog.text] == [*SPLITS[:2]]
    assert run.result["last"]["tasks"] == ran.evaluations[-1].metrics
    _, private = undisturbed.state(ran.outcome.versions["last"].groups)
    last = load_file(run.directory / "last.safetensors")
    assert all(torch.equal(tensor, last[f"tasks/pets/{name}"]) for name, tensor in private["pets"].items())

    bundle = run.export().bundles["pets"].read_bytes()
    before = {split: evaluate_models(run.models()[1], spec, split) for split in SPLITS}
    write(data, CLASSES)
    for models in (run.models()[1], open_export(run.directory / "export")[1]):
        assert {split: evaluate_models(models, spec, split) for split in SPLITS} == before

    shutil.rmtree(data)
    monkeypatch.chdir("/")
    assert Run(run.directory).export(to=tmp_path / "again").bundles["pets"].read_bytes() == bundle
    assert patches.inspect_bundle(tmp_path / "again" / "pets.patch").classes == CLASSES


def test_a_table_that_lacks_a_class_is_evaluated_by_name(make_spec: MakeSpec, data: Path, tmp_path: Path) -> None:
    spec = make_spec({"pets": {"data": str(data)}})
    job = Job(spec)
    model = attach_task(job.backbone, spec.tasks[0], spec)
    model.classes = job.classes["pets"]
    shutil.rmtree(data / "test")
    write_named(data / "test", ["class 3", "class 1"], seed=200)

    metrics = evaluate_models({"pets": model}, spec, "test", tmp_path / "predictions")["pets"]

    found = read_predictions(tmp_path / "predictions")
    assert (found.names, found.labels.tolist()) == (tuple(CLASSES), [1, 3] * 12)
    assert metrics["top1"] == pytest.approx(100 * found.right("pets").mean())
    shutil.rmtree(data / "test")
    write_named(data / "test", [*CLASSES, "class x"])
    with pytest.raises(DataError, match=r"test: found 'class x', which the model does not know"):
        evaluate_models({"pets": model}, spec, "test")


def test_a_task_keeps_its_record_and_another_of_its_name_gets_a_new_one(
    make_spec: MakeSpec, data: Path, tmp_path: Path
) -> None:
    spec, cars = make_spec({"pets": {"data": str(data)}}), make_spec({"cars": {}})
    first = write_tasks(tmp_path, Job(spec), {})
    assert first["pets"].classes == tuple(CLASSES)
    assert first["pets"].preprocessing["resolution"] == 8
    write(data, OTHER)

    assert write_tasks(tmp_path, Job(spec, kept={"pets": tuple(CLASSES)}), first) == first
    others = write_tasks(tmp_path, Job(cars), first)
    assert set(others) == {"cars"}
    again = write_tasks(tmp_path, Job(spec), others)
    assert again["pets"].classes == tuple(OTHER)
    assert again["pets"].tables["train"] != first["pets"].tables["train"]
    assert read_tasks(tmp_path) == again


def test_a_damaged_record_is_named_and_one_that_is_missing_is_made_of_the_table(
    make_spec: MakeSpec, data: Path, tmp_path: Path
) -> None:
    task = make_spec({"pets": {"data": str(data)}}).tasks[0]
    assert record_of(task, read_tasks(tmp_path)).classes == tuple(CLASSES)

    for damaged in ("", "[" * 100_000, '{"pets": {}}', '{"pets": 1}', '{"pets": {"classes": [1]}}', "\udcff"):
        (tmp_path / "tasks.json").write_bytes(damaged.encode("utf-8", "surrogateescape"))
        with pytest.raises(RunError, match=r"tasks\.json': expected the class list") as error:
            read_tasks(tmp_path)
        assert len(str(error.value)) - len(str(tmp_path)) < 700
    (tmp_path / "tasks.json").unlink()
    os.mkfifo(tmp_path / "tasks.json")
    with pytest.raises(RunError, match="it is not a regular file"):  # reading it would wait for ever
        read_tasks(tmp_path)
