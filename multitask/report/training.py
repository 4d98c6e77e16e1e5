"""The report of a finished training: one HTML page that needs no other file."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from multitask.progress import duration
from multitask.report.answers import (
    Answers,
    class_accuracies,
    classes_without_images,
    confusion_matrix,
    confusions,
)
from multitask.report.pages import environment, inline
from multitask.report.plots import (
    AMBER,
    BLUE,
    DPI,
    Colour,
    Drawn,
    Theme,
    bare,
    drawn,
    human_bytes,
    human_count,
    padded,
    png,
)
from patches.files import write_atomic

Point = tuple[float, float]
"""A round, and a value that belongs to it."""
FIGURE_INCHES = (4.6, 2.5)
"""Width and height of a figure. It is narrow, so that its numbers can be read on a telephone."""
MARKED_POINTS = 20
"""Up to this number of points of a curve, each is marked."""
MATRIX_CLASSES = 20
"""Largest number of classes for which the whole confusion matrix is shown."""
CONFUSIONS_SHOWN = 15
CLASSES_SHOWN = 20
"""Number of classes whose accuracy is shown at first; the others are folded."""
TOP5_CLASSES = 5
"""Up to this number of classes, every answer is among the first five."""


@dataclass(frozen=True, kw_only=True)
class TrainedTask:
    """What the report shows of one task."""

    name: str
    method: str
    resolution: int
    metrics: Mapping[str, float]
    """Validation `top1` and `top5` in percent, and `loss`, of the best version."""
    accuracy: Sequence[Point]
    """Rounds and validation top-1 in percent, one for each evaluated version."""
    validation_loss: Sequence[Point]
    training_loss: Sequence[Point]
    """Rounds and means of the training loss; empty if the run did not record it."""
    answers: Answers
    """Answers of the best version on the validation images."""
    skipped: int
    """Number of validation images that could not be decoded."""
    other_table: bool
    """Whether the validation table is another one than the run began with."""
    trained_on: bool
    """Whether the task was trained on its validation images too."""
    mistakes: Sequence[tuple[int, bytes]]
    """Some wrong answers: position in `answers`, and a picture of the image (PNG or JPEG)."""
    patch_bytes: int
    """Size of the task's private tensors."""
    workers: int
    pushes: int
    """Number of pushes that were applied."""
    mean_staleness: float
    faults: Mapping[str, int]
    """Name -> number of what went wrong while the task was trained. All tasks have the same names."""


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """What the report shows of a run."""

    name: str
    directory: Path
    backbone: str
    """Name of the backbone."""
    backbone_bytes: int
    version: int
    """The best version, which the report is about."""
    round: int
    """Its round."""
    last: tuple[int, float] | None
    """The last version, and its mean validation top-1 in percent; None if it is the best one."""
    seconds: float
    """Time that the training took."""
    facts: Mapping[str, str]
    """Further facts: name -> value."""
    settings: str
    """The job spec as YAML."""
    tasks: Sequence[TrainedTask]


def headline(run: TrainedRun) -> str:
    """Return the result in one sentence."""
    evaluated = max(len(task.accuracy) for task in run.tasks)
    chosen = f"version {run.version}, the best of {evaluated} evaluated ones" if evaluated > 1 else "the last version"
    if len(run.tasks) == 1:
        task = run.tasks[0]
        images = f"{len(task.answers):,} validation images of {len(task.answers.classes):,} classes"
        return f"{task.metrics['top1']:.1f} % of {images} get the right answer ({chosen})."
    mean = sum(task.metrics["top1"] for task in run.tasks) / len(run.tasks)
    return f"{len(run.tasks)} tasks on one {run.backbone}: {mean:.1f} % mean top-1 on validation images ({chosen})."


def write_training_report(run: TrainedRun, path: Path) -> None:
    """Write the report, which contains all pictures and needs no other file, completely or not at all."""
    html = (
        environment()
        .get_template("training.html")
        .render(
            run=run,
            headline=headline(run),
            colours=[BLUE, AMBER],
            tasks=_tasks(run.tasks),
            duration=duration(run.seconds),
            sections=[_section(task, run.round) for task in run.tasks],
            workers=_workers(run.tasks),
            sizes=_sizes(run),
            commands=next_commands(run.directory, len(run.tasks)),
        )
    )
    write_atomic(path, html.encode())


def next_commands(directory: Path, tasks: int) -> list[tuple[str, str]]:
    """Return what may come next after a training: words, and the command."""
    task = " --task TASK" if tasks > 1 else ""
    run = shlex.quote(str(directory))
    export = shlex.quote(str(directory / "export"))
    return [
        ("Write the backbone and the patches as files:", f"multitask export {run}"),
        ("Measure them on the test tables, once all choices are made:", f"multitask evaluate {run} --split test"),
        ("Name the class of photos:", f"multitask predict {export} PHOTO...{task}"),
        ("Write this page again:", f"multitask report {run}"),
    ]


def accuracy_figure(points: Sequence[Point], best_round: int, theme: Theme) -> bytes:
    """Return a PNG of validation accuracy over rounds, in which the best version is marked.

    Args:
        points: rounds and percentages, at least one.
        best_round: round of the best version.
    """
    figure, axes = _curves([(points, BLUE)], theme)
    axes.set_ylim(*padded(min(y for _, y in points), max(y for _, y in points)))
    middle, colour = sum(axes.get_xlim()) / 2, BLUE[theme.dark]
    for x, y in [point for point in points if point[0] == best_round][:1]:
        axes.plot(x, y, "o", color=colour, markersize=7, zorder=3)
        label = axes.annotate(
            f"best version: {y:.1f} %",
            (x, y),
            xytext=(-8 if x > middle else 8, -9),
            textcoords="offset points",
            ha="right" if x > middle else "left",
            va="top",
            color=colour,
            fontsize=9.5,
            fontweight="bold",
        )
        label.set_path_effects([withStroke(linewidth=4, foreground=theme.ground)])  # where the curve goes through it
    return png(figure)


def loss_figure(training: Sequence[Point], validation: Sequence[Point], theme: Theme) -> bytes:
    """Return a PNG of training and validation loss over rounds. At least one of the two has points."""
    return png(_curves([(training, AMBER), (validation, BLUE)], theme)[0])


def _curves(curves: Sequence[tuple[Sequence[Point], Colour]], theme: Theme) -> tuple[Figure, Axes]:
    """Return a figure and its axes with curves over rounds. Curves without points are left out."""
    width, height = FIGURE_INCHES
    figure = Figure(figsize=FIGURE_INCHES, dpi=DPI, facecolor=theme.ground)
    axes = figure.add_axes((0.5 / width, 0.48 / height, 1 - 0.7 / width, 1 - 0.6 / height))
    bare(axes, theme, "y")
    for points, colour in curves:
        if points:
            rounds, values = zip(*points, strict=True)
            marker = "o" if len(points) <= MARKED_POINTS else ""
            axes.plot(rounds, values, color=colour[theme.dark], linewidth=1.7, marker=marker, markersize=3.5)
    axes.set_xlim(0, 1.02 * max(1.0, *(x for points, _ in curves for x, _ in points)))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: human_count(value))
    axes.set_xlabel("rounds", color=theme.muted, fontsize=9)
    axes.tick_params(labelsize=9)
    return figure, axes


def _figures(task: TrainedTask, best_round: int) -> list[tuple[Drawn, list[tuple[str, int]]]]:
    """Return the figures of a task for which there are numbers, each with its legend: words and numbers of colours."""
    figures = []
    if task.accuracy:
        words = "Validation accuracy over rounds"
        picture = drawn("accuracy", words, lambda theme: accuracy_figure(task.accuracy, best_round, theme))
        figures.append((picture, [("validation accuracy, top-1 in percent", 0)]))
    curves = [("training loss", 1, task.training_loss), ("validation loss", 0, task.validation_loss)]
    legend = [(name, colour) for name, colour, points in curves if points]
    if legend:
        words = f"{' and '.join(name for name, _ in legend).capitalize()} over rounds"
        picture = drawn("loss", words, lambda theme: loss_figure(task.training_loss, task.validation_loss, theme))
        figures.append((picture, legend))
    return figures


def _tasks(tasks: Sequence[TrainedTask]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the table of tasks. It has top-5 only for tasks of more than five classes."""
    top5 = {task.name: f"{task.metrics['top5']:.1f}" for task in tasks if len(task.answers.classes) > TOP5_CLASSES}
    header = ["task", "top-1, %", *(["top-5, %"] if top5 else []), "loss", "classes", "images", "method", "pixels"]
    lines = [
        [
            task.name,
            f"{task.metrics['top1']:.1f}",
            *([top5.get(task.name, "")] if top5 else []),
            f"{task.metrics['loss']:.3f}",
            f"{len(task.answers.classes):,}",
            f"{len(task.answers):,}",
            task.method,
            f"{task.resolution}",
        ]
        for task in tasks
    ]
    return header, lines


def _workers(tasks: Sequence[TrainedTask]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the table of workers. Faults that no task has are left out."""
    faults = [name for name in tasks[0].faults if any(task.faults[name] for task in tasks)]
    lines = [
        [
            task.name,
            f"{task.workers:,}",
            f"{task.pushes:,}",
            f"{task.mean_staleness:.2f}",
            *(f"{task.faults[name]:,}" for name in faults),
        ]
        for task in tasks
    ]
    return ["task", "workers", "pushes", "mean staleness", *faults], lines


def _section(task: TrainedTask, best_round: int) -> dict[str, Any]:
    """Return what the template shows of a task."""
    found = task.answers
    accuracies, confused = class_accuracies(found), confusions(found)
    whole = len(found.classes) <= MATRIX_CLASSES
    return {
        "task": task,
        "figures": _figures(task, best_round),
        "shown": accuracies if len(accuracies) <= CLASSES_SHOWN else accuracies[: CLASSES_SHOWN // 2],
        "folded": [] if len(accuracies) <= CLASSES_SHOWN else accuracies[CLASSES_SHOWN // 2 :],
        "missing": classes_without_images(found),
        "matrix": _matrix(found) if whole and confused else [],
        "confusions": [] if whole else confused[:CONFUSIONS_SHOWN],
        "wrong": int((found.labels != found.answers).sum()),
        "mistakes": [
            {
                "picture": inline(picture),
                "label": found.classes[found.labels[place]],
                "answer": found.classes[found.answers[place]],
                "percent": f"{100 * found.probabilities[place]:.0f} %",
                "row": int(found.rows[place]),
            }
            for place, picture in task.mistakes
        ],
    }


def _matrix(found: Answers) -> list[tuple[str, list[tuple[int, float]]]]:
    """Return a line for each class: its name, and for each answer the number of images and their share of the line."""
    counts = confusion_matrix(found)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    return [
        (name, list(zip(line.tolist(), share.tolist(), strict=True)))
        for name, line, share in zip(found.classes, counts, shares, strict=True)
    ]


def _sizes(run: TrainedRun) -> list[tuple[str, str, str, float]]:
    """Return a line for the backbone and for each patch: name, size, share of the backbone, share of the largest."""
    sizes = [(f"backbone {run.backbone}", run.backbone_bytes), *((task.name, task.patch_bytes) for task in run.tasks)]
    largest = max(size for _, size in sizes)
    return [
        (name, human_bytes(size), f"{size / run.backbone_bytes:.1%}" if number else "", size / largest)
        for number, (name, size) in enumerate(sizes)
    ]
