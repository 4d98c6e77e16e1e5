"""The report of a finished run: its best version answers the validation images once more, and a page shows how."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

from multitask.data import Batch, ImageTable
from multitask.data.thumbnails import thumbnail
from multitask.evaluation import evaluate, torch_threads
from multitask.job.tables import open_split, table_batches
from multitask.report.answers import Answers, surest_mistakes
from multitask.report.training import TrainedRun, TrainedTask, write_training_report
from multitask.run.directory import Run
from multitask.run.files import RESULT_REMEDY, TaskResult, checked
from multitask.run.tasks import TaskRecord, read_tasks, record_of
from multitask.server.messages import mean_top1
from multitask.spec.reading import dump_yaml
from multitask.spec.schema import TaskSpec
from patches import PatchedModel

REPORT = "report.html"
MISTAKES = 24
"""Largest number of wrongly answered images of a task that the report shows."""
PICTURE_SIDE = 208
"""Longer side of such an image in the report, in pixels: twice its width on the page, for screens with small pixels."""


def write_report(directory: str | Path, on_images: Callable[[int, int], None] = lambda *_: None) -> Path:
    """Write `report.html` in the directory of a finished run. It replaces an earlier report.

    The best version is evaluated on the images that each evaluation during training reads (`validation_images`).

    Args:
        directory: the run directory.
        on_images: called after each batch with the number of images that were evaluated, and the number of all images.
    Returns:
        The path of the report.
    Raises:
        RunError: there is no finished run, or one of its files is damaged.
        DataError: a validation table cannot be read, or has a class that the model does not know.
    """
    run = Run(Path(directory).resolve())
    records = read_tasks(run.directory)
    results = {task.name: _task_result(run, task.name) for task in run.spec.tasks}
    work = []
    for task in run.spec.tasks:
        record = record_of(task, records)
        work.append((task, record, open_split(task, "validation", verify=False).in_classes(record.classes)))
    backbone, models = run.models("best")
    total = sum(min(task.validation_images or table.num_rows, table.num_rows) for task, _, table in work)
    done = 0

    def note(images: int) -> None:
        nonlocal done
        done += images
        on_images(done, total)

    with torch_threads(run.spec.resources.threads_per_worker):
        tasks = [
            _trained_task(task, models[task.name], table, record, results[task.name], note)
            for task, record, table in work
        ]
    path = run.directory / REPORT
    write_training_report(_trained_run(run, _bytes(backbone.network.state_dict().values()), tasks), path)
    return path


def _task_result(run: Run, name: str) -> TaskResult:
    """Return what the run's result says about the training of a task, also if version 0.1 wrote it.

    Raises:
        RunError: the result says nothing of the task, or is damaged.
    """
    where = run.directory / "result.json"
    tasks = run.result.get("tasks")
    found = tasks.get(name) if isinstance(tasks, dict) else None
    if isinstance(found, dict):
        found = {key.replace("refused", "rejected"): value for key, value in found.items()}
    return checked(TaskResult, found, where, RESULT_REMEDY)


def _trained_task(
    task: TaskSpec,
    model: PatchedModel,
    table: ImageTable,
    record: TaskRecord,
    result: TaskResult,
    note: Callable[[int], None],
) -> TrainedTask:
    """Evaluate a task's model, and return what the report shows of the task."""
    metrics, answers, skipped = _validate(model, task, table, note)
    mistakes = surest_mistakes(answers, MISTAKES).tolist()
    images = table.rows([int(answers.rows[place]) for place in mistakes])
    faults = {"redone steps": result.redone_steps, "lost pushes": result.lost_pushes}
    faults |= {"rejected pushes": result.rejected_pushes, "skipped images": result.skipped_images}
    return TrainedTask(
        name=task.name,
        method=task.method,
        resolution=task.resolution,
        metrics=metrics,
        accuracy=[(point["step"], point["top1"]) for point in result.curve],
        validation_loss=[(point["step"], point["loss"]) for point in result.curve if "loss" in point],
        training_loss=[(round_, loss) for round_, loss, _ in result.losses],
        answers=answers,
        skipped=skipped,
        other_table=record.tables.get("validation", table.identity) != table.identity,
        trained_on=task.train_on == "train+validation",
        mistakes=[(place, thumbnail(row.image, PICTURE_SIDE)) for place, row in zip(mistakes, images, strict=True)],
        patch_bytes=_bytes(model.private_state().values()),
        workers=task.workers,
        pushes=result.pushes,
        mean_staleness=result.mean_staleness,
        faults=faults,
    )


def _validate(
    model: PatchedModel, task: TaskSpec, table: ImageTable, note: Callable[[int], None]
) -> tuple[dict[str, float], Answers, int]:
    """Evaluate a model on the validation images.

    Args:
        note: called with the number of images of each batch.
    Returns:
        top1 and top5 in percent and loss, the answers, and the number of images that could not be decoded.
    """
    parts = []
    skipped = 0

    def keep(batch: Batch, logits: Tensor) -> None:
        nonlocal skipped
        best = logits.softmax(dim=1).max(dim=1)
        parts.append((batch.rows, batch.labels.numpy(), best.indices.numpy(), best.values.numpy()))
        skipped += batch.skipped
        note(len(batch.labels) + batch.skipped)

    metrics = evaluate(model, table_batches(table, task, rows=task.validation_images), keep=keep)
    rows, labels, answers, probabilities = (np.concatenate(part) for part in zip(*parts, strict=True))
    found = Answers(classes=table.classes, rows=rows, labels=labels, answers=answers, probabilities=probabilities)
    return metrics, found, skipped


def _trained_run(run: Run, backbone_bytes: int, tasks: list[TrainedTask]) -> TrainedRun:
    """Return what the report shows of the run."""
    best, last = run.result["best"], run.result["last"]
    return TrainedRun(
        name=run.spec.name,
        directory=run.directory,
        backbone=run.spec.backbone.name,
        backbone_bytes=backbone_bytes,
        version=best["version"],
        round=best["round"],
        last=None if last["version"] == best["version"] else (last["version"], mean_top1(last["tasks"].values())),
        seconds=run.result["seconds"],
        facts={
            "engine": run.spec.engine.name,
            "steps": f"{run.spec.steps:,}",
            "trained parameters": f"{run.result['trained_parameters']:,}",
            "seed": f"{run.spec.seed}",
        },
        settings=dump_yaml(run.spec),
        tasks=tasks,
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
