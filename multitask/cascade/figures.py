"""The figures, tables and sentences of the report's section about a cascade."""

from typing import Any

import numpy as np
import torch

from multitask.cascade.cascade import OperatingPoint, answers_of
from multitask.cascade.checking import Check
from multitask.cascade.predictions import Predictions
from multitask.data import ImageTable
from multitask.data.sheet import picture_grid
from multitask.report.plots import (
    BLUE,
    GREY,
    POINTS_PER_INCH,
    WIDTH,
    Theme,
    bare,
    caption,
    drawn,
    human_count,
    new_figure,
    padded,
    plain,
    png,
    spread,
)

CASCADE, SINGLE = BLUE, GREY
SHEET_IMAGES = 8
"""Number of images of each stage on the contact sheet."""


def headline(check: Check) -> str:
    """Return the result in one or two sentences, with 95 % intervals."""
    gain, saving, against = check.accuracy_gain, check.saving, check.saving_against_equal
    text = (
        f"The cascade answers {100 * check.accuracy.mean:.1f} % of {check.images:,} images rightly, "
        f"{100 * gain.mean:+.2f} points ({100 * gain.low:+.2f} to {100 * gain.high:+.2f}) against model "
        f"'{check.reference.model}', for {100 * saving.mean:.1f} % fewer {check.unit} "
        f"({100 * saving.low:.1f} to {100 * saving.high:.1f})."
    )
    if check.equal.model != check.reference.model:
        text += f" Against '{check.equal.model}', the cheapest single model about as accurate, the saving is "
        text += f"{100 * against.mean:.1f} % ({100 * against.low:.1f} to {100 * against.high:.1f})."
    return text


def stage_rows(check: Check) -> list[tuple[str, ...]]:
    """Return a line for each stage: number, model, when it answers, share of the images, and accuracy on them."""
    return [
        (
            str(number + 1),
            stage.model,
            stage.rule,
            f"{100 * stage.share:.1f} %",
            "–" if stage.accuracy is None else f"{100 * stage.accuracy:.1f} %",
        )
        for number, stage in enumerate(check.stages)
    ]


def model_rows(check: Check) -> list[tuple[str, ...]]:
    """Return a line for the cascade and for each single model: name, accuracy, and mean cost."""
    singles = [
        (
            f"{single.model} (reference)" if single.model == check.reference.model else single.model,
            f"{100 * single.accuracy:.2f} %",
            f"{single.cost:,.4g}",
        )
        for single in check.singles
    ]
    return [("cascade", f"{100 * check.accuracy.mean:.2f} %", f"{check.mean_cost.mean:,.4g}"), *singles]


def accuracy_cost(check: Check, theme: Theme) -> bytes:
    """Return a PNG of accuracy against cost, with all single models and the curve of the cascade's operating points."""
    of_cascade, of_single = CASCADE[theme.dark], SINGLE[theme.dark]
    height = 4.7
    figure = new_figure(WIDTH, height, theme, "Accuracy against mean cost: cascades and single models")
    axes = figure.add_axes((0.07, 0.62 / height, 0.9, (height - 1.6) / height))
    bare(axes, theme, "y")
    costs, accuracies = zip(*((cost, 100 * accuracy) for cost, accuracy in sorted(check.curve)), strict=True)
    values = [*accuracies, *(100 * single.accuracy for single in check.singles)]
    low, high = padded(min(values), max(values))
    dearest = max(single.cost for single in check.singles)
    axes.set_xlim(0, dearest * 1.22)
    axes.set_ylim(low, high)
    axes.plot(costs, accuracies, "o-", color=of_cascade, markersize=5, linewidth=1.8, zorder=3)
    asked = (check.mean_cost.mean, 100 * check.accuracy.mean)
    axes.plot(*asked, "o", color=of_cascade, markersize=11, zorder=4)
    labels = [(*asked, f"cascade {asked[1]:.1f} %", of_cascade)]
    for single in check.singles:
        name = f"{plain(single.model)}{' (reference)' if single.model == check.reference.model else ''}"
        labels.append((single.cost, 100 * single.accuracy, f"{name} {100 * single.accuracy:.1f} %", of_single))
        axes.plot(single.cost, 100 * single.accuracy, "s", color=of_single, markersize=7, zorder=2)
    gap = 12 * (high - low) / ((height - 1.6) * POINTS_PER_INCH)
    places = spread([label[1] for label in labels], gap, low, high)
    for (x, y, text, colour), place in zip(labels, places, strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkB": 5}
        axes.annotate(
            text, (x, y), xytext=(x + dearest * 0.03, place), color=colour, fontsize=9, va="center", arrowprops=line
        )
    axes.xaxis.set_major_formatter(lambda value, _: human_count(value))
    axes.set_xlabel(f"mean {plain(check.unit)} of an image", color=theme.muted, fontsize=9)
    axes.set_ylabel("top-1, %", color=theme.muted, fontsize=9)
    caption(axes, f"On {check.images:,} images that were not used for fitting", theme)
    return png(figure)


def stage_shares(check: Check, theme: Theme) -> bytes:
    """Return a PNG of the share of images that each stage answers."""
    height = 1.2 + 0.42 * len(check.stages)
    figure = new_figure(WIDTH, height, theme, "Where images stop")
    axes = figure.add_axes((0.2, 0.15 / height, 0.62, (height - 0.75) / height))
    bare(axes, theme, None)
    for number, stage in enumerate(check.stages):
        axes.barh(number, 100 * stage.share, color=CASCADE[theme.dark], height=0.55)
        right = "" if stage.accuracy is None else f", {100 * stage.accuracy:.1f} % right"
        text = f" {100 * stage.share:.1f} % of the images{right}"
        axes.text(100 * stage.share, number, text, color=theme.text, fontsize=9, va="center")
    axes.set_xlim(0, 100)
    axes.set_ylim(len(check.stages) - 0.5, -0.5)
    axes.set_xticks([])
    names = [f"{number + 1}: {plain(stage.model)}" for number, stage in enumerate(check.stages)]
    axes.set_yticks(range(len(names)), names, fontsize=9.5, color=theme.text)
    return png(figure)


def stage_sheet(table: ImageTable, predictions: Predictions, point: OperatingPoint) -> bytes:
    """Return a PNG with one line of images for each stage: the first images that the stage answers.

    Args:
        table: the table that contains the images.
        predictions: predictions on that table. A row is the number of the image in the table.
        point: operating point of the cascade.
    """
    answers = answers_of(point, predictions)
    if predictions.names is not None:
        table = table.in_classes(predictions.names)
    cells: list[tuple[torch.Tensor, str] | None] = []
    for number in range(len(point.stages)):
        chosen = np.flatnonzero(answers.stages == number)[:SHEET_IMAGES]
        for place in chosen:
            row = table.row(int(predictions.rows[place]))
            name, answer = table.classes[row.label], table.classes[answers.labels[place]]
            title = f"{number + 1}: {name}" if name == answer else f"{number + 1}: {name} ≠ {answer}"
            cells.append((torch.frombuffer(bytearray(row.image), dtype=torch.uint8), title))
        cells += [None] * (SHEET_IMAGES - len(chosen))
    return picture_grid(cells, SHEET_IMAGES)


def section(check: Check, sheet: bytes | None = None, package: str | None = None) -> dict[str, Any]:
    """Return the section about a cascade that the demo's report and `write_cascade_report` show.

    Args:
        check: measurements of the cascade.
        sheet: PNG of images that each stage answers.
        package: path of the file that contains the cascade with its bundles.
    """
    curve = "Accuracy against mean cost of single models and of the cascade's operating points."
    shares = "Share of the images that each stage answers."
    return {
        "headline": headline(check),
        "unit": check.unit,
        "stages": stage_rows(check),
        "models": model_rows(check),
        "figures": [
            drawn("accuracy_cost", curve, lambda theme: accuracy_cost(check, theme)),
            drawn("stage_shares", shares, lambda theme: stage_shares(check, theme)),
        ],
        "sheet": sheet,
        "package": package,
    }
