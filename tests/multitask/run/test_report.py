"""The report of a real run: its numbers are those of the training, and it reads no more images than it needs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import multitask
from multitask.data import DataError
from multitask.data.table import ImageTable
from multitask.report.training import TrainedRun
from multitask.run import report
from multitask.run.directory import RunError
from multitask.run.live import read_status
from multitask.spec.schema import JobSpec
from tests.conftest import CLASSES, write_named
from tests.test_v0_1 import FILES


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[TrainedRun]:
    """What the reports of a test show; they are not drawn."""
    found: list[TrainedRun] = []
    monkeypatch.setattr(report, "write_training_report", lambda run, _: found.append(run))
    return found


def test_the_best_version_answers_as_it_did_in_training(
    make_spec: Callable[..., JobSpec], shown: list[TrainedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(
        tasks={"pets": {"validation_images": 10}, "cars": {}},
        steps=9,
        evaluate_every=1,
        optimizer={"name": "sgd", "rate": 0.5},
    )
    run = multitask.train(spec)
    read: list[int] = []
    progress: list[tuple[int, int]] = []
    whole = ImageTable.rows
    monkeypatch.setattr(ImageTable, "rows", lambda table, rows: (read.extend(rows), whole(table, rows))[1])

    multitask.write_report(run.directory, lambda done, total: progress.append((done, total)))

    (told,) = shown
    best = run.result["best"]
    assert (told.version, told.round) == (best["version"], best["round"])
    assert best["version"] != run.result["last"]["version"]
    assert told.last is not None
    assert {task.name: task.metrics for task in told.tasks} == best["tasks"]
    assert [len(task.answers) for task in told.tasks] == [10, 24]
    for task in told.tasks:
        right = task.answers.labels == task.answers.answers
        assert 100 * right.mean() == pytest.approx(task.metrics["top1"])
        assert task.answers.classes == tuple(CLASSES)
        assert [loss for _, loss in task.training_loss] == [
            loss for _, loss, _ in read_status(run.directory)["tasks"][task.name]["losses"]
        ]
        assert [round_ for round_, _ in task.training_loss] == list(range(9))
        assert not task.other_table
    mistakes = [int(task.answers.rows[place]) for task in told.tasks for place, _ in task.mistakes]
    assert read == mistakes != []
    assert progress[-1] == (34, 34)


def test_another_order_of_the_classes_changes_no_answer_and_is_told(
    make_spec: Callable[..., JobSpec], shown: list[TrainedRun], tmp_path: Path
) -> None:
    for split in ("train", "validation"):
        write_named(tmp_path / "data" / split, CLASSES)
    run = multitask.train(make_spec(tasks={"pets": {"data": str(tmp_path / "data")}}, steps=2))
    shutil.rmtree(tmp_path / "data" / "validation")
    write_named(tmp_path / "data" / "validation", CLASSES[::-1])

    multitask.write_report(run.directory)

    (task,) = shown[0].tasks
    assert task.other_table
    assert task.metrics["top1"] == run.result["best"]["tasks"]["pets"]["top1"]
    assert task.answers.classes == tuple(CLASSES)


def test_a_run_of_version_0_1_has_a_report_and_a_damaged_one_an_error(
    shown: list[TrainedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(FILES, tmp_path / "v0_1")
    monkeypatch.chdir(tmp_path / "v0_1")

    multitask.write_report("finished")

    assert [(task.name, task.pushes, task.training_loss) for task in shown[0].tasks] == [
        ("pets_8", 12, []),
        ("pets_12", 24, []),
    ]
    path = tmp_path / "v0_1" / "finished" / "result.json"
    result: dict[str, Any] = json.loads(path.read_text())
    for damage in ({"tasks": {**result["tasks"], "pets_12": None}}, {"tasks": []}):
        path.write_text(json.dumps(result | damage))
        with pytest.raises(RunError, match=r"result\.json' is damaged"):
            multitask.write_report("finished")
    path.write_text(json.dumps(result))
    shutil.rmtree(tmp_path / "v0_1" / "table" / "validation")
    with pytest.raises(DataError, match="table/validation"):
        multitask.write_report("finished")
