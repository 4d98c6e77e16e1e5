"""The figures, tables and sentences of the report's section about a cascade."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from multitask.cascade.cascade import OperatingPoint, answers_of
from multitask.cascade.checking import Check, Interval
from multitask.cascade.costs import MACS, cost_text
from multitask.cascade.predictions import Predictions
from multitask.data import ImageTable
from multitask.data.sheet import picture_grid
from multitask.report.plots import (
    BLUE,
    GREY,
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
    text_width,
)

CASCADE, SINGLE = BLUE, GREY
SHEET_IMAGES = 8
"""Number of images of each stage on the contact sheet."""
ENOUGH_IMAGES = 300
"""A check on fewer images warns: for an accuracy of 90 %, its 95 % interval is then wider than 7 points."""
NAME_CHARACTERS = 30
"""Length from which a name is written on several lines."""


def headline(check: Check) -> str:
    """Return the result in a few sentences, with 95 % intervals."""
    accuracy, gain = check.accuracy, check.accuracy_gain
    alone = check.stages[0].model if len(check.stages) == 1 else None
    text = "The cascade" if alone is None else f"No other model answers: the cascade is model '{alone}' alone, and"
    text += (
        f" answers {100 * accuracy.mean:.1f} % ({100 * accuracy.low:.1f} to {100 * accuracy.high:.1f}) of "
        f"{check.images:,} images rightly"
    )
    if alone != check.reference.model:
        text += (
            f", {100 * gain.mean:+.2f} points ({100 * gain.low:+.2f} to {100 * gain.high:+.2f}) against model "
            f"'{check.reference.model}', for {_difference(check.saving, check.unit)}"
        )
    text += "."
    if check.equal.model not in (check.reference.model, alone):
        text += (
            f" Against '{check.equal.model}', the cheapest single model that is about as accurate or better, it takes "
            f"{_difference(check.saving_against_equal, check.unit)}."
        )
    if check.images < ENOUGH_IMAGES:
        text += (
            f" These numbers are uncertain, because they are from {check.images} images. Check the cascade on "
            f"{ENOUGH_IMAGES} images or more before you rely on them."
        )
    return text


def _difference(saving: Interval, unit: str) -> str:
    """Return a saved share of the cost, which may be negative, in words: "40.0 % fewer MACs (39.0 to 41.0)"."""
    fewer = "fewer" if unit == MACS else "less"
    mean, low, high = (100 * value for value in (saving.mean, saving.low, saving.high))
    if low < 0 < high:
        span = f"{-low:.1f} more to {high:.1f} {fewer}"
    else:
        span = " to ".join(f"{end:.1f}" for end in sorted((abs(low), abs(high))))
    return f"{abs(mean):.1f} % {'more' if mean < 0 else fewer} {unit} ({span})"


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
            cost_text(single.cost, check.unit),
        )
        for single in check.singles
    ]
    return [("cascade", f"{100 * check.accuracy.mean:.2f} %", cost_text(check.mean_cost.mean, check.unit)), *singles]


def accuracy_cost(check: Check, theme: Theme) -> bytes:
    """Return a PNG of accuracy against cost, with all single models and the cascade's operating points.

    A line joins the operating points that are more accurate than every cheaper one.
    """
    of_cascade, of_single = CASCADE[theme.dark], SINGLE[theme.dark]
    accuracy = 100 * check.accuracy.mean
    labels = [(check.mean_cost.mean, accuracy, f"cascade {accuracy:.1f} %", of_cascade)]
    for single in check.singles:
        name = f"{single.model}{' (reference)' if single.model == check.reference.model else ''}"
        text = f"{_lines(name)} {100 * single.accuracy:.1f} %"
        labels.append((single.cost, 100 * single.accuracy, text, of_single))
    label_inches = 0.17 * max(1 + text.count("\n") for _, _, text, _ in labels)
    height = max(4.7, 1.6 + label_inches * len(labels))
    figure = new_figure(WIDTH, height, theme, "Accuracy against mean cost: cascades and single models")
    right = WIDTH - 0.15 - max(text_width(figure, text, 9) for _, _, text, _ in labels)
    axes = figure.add_axes((0.07, 0.62 / height, (right - 0.45) / WIDTH - 0.07, (height - 1.6) / height))
    bare(axes, theme, "y")
    best = undominated(check.curve)
    values = [y for _, y, _, _ in labels] + [100 * share for _, share in check.curve]
    low, high = padded(min(values), max(values))
    image = 100 / check.images  # one image more or less is no difference to be seen large
    low, high = max(0.0, low - image), min(101.5, high + image)
    axes.set_xlim(0, max(cost for cost, _ in (*check.curve, *((x, y) for x, y, _, _ in labels))) * 1.04)
    axes.set_ylim(low, high)
    costs, accuracies = zip(*((cost, 100 * share) for cost, share in best), strict=True)
    axes.plot(costs, accuracies, "o-", color=of_cascade, markersize=5, linewidth=1.8, zorder=3)
    for cost, share in set(check.curve) - set(best):
        axes.plot(cost, 100 * share, "o", color=of_cascade, markersize=5, fillstyle="none", zorder=3)
    axes.plot(check.mean_cost.mean, accuracy, "o", color=of_cascade, markersize=11, zorder=4)
    places = spread([y for _, y, _, _ in labels], label_inches / (height - 1.6) * (high - low), low, high)
    for (x, y, text, colour), place in zip(labels, places, strict=True):
        if colour == of_single:
            axes.plot(x, y, "s", color=of_single, markersize=7, zorder=2)
        # All labels stand in one column, where their lines end: no label covers a point or another label.
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.5, "shrinkA": 1, "shrinkB": 5}
        axes.annotate(
            text,
            (x, y),
            xytext=(right / WIDTH, place),
            textcoords=("figure fraction", "data"),
            color=colour,
            fontsize=9,
            va="center",
            arrowprops=line | {"relpos": (0, 0.5)},
        )
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= min(high, 100)])
    axes.xaxis.set_major_formatter(lambda value, _: human_count(value))
    axes.set_xlabel(f"mean {plain(check.unit)} of an image", color=theme.muted, fontsize=9)
    axes.set_ylabel("top-1, %", color=theme.muted, fontsize=9)
    hollow = "" if len(best) == len(set(check.curve)) else "; a hollow point is no better than a cheaper one"
    caption(axes, f"On {check.images:,} images that were not used for fitting{hollow}", theme)
    return png(figure)


def undominated(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the pairs (cost, accuracy) that are more accurate than every cheaper one, from cheap to dear."""
    best: list[tuple[float, float]] = []
    for cost, accuracy in sorted(set(curve), key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((cost, accuracy))
    return best


def _lines(name: str) -> str:
    """Return a name for a figure, on several lines if it is long."""
    return plain("\n".join(textwrap.wrap(name, NAME_CHARACTERS)))


def stage_shares(check: Check, theme: Theme) -> bytes:
    """Return a PNG of the share of images that each stage answers."""
    names = [_lines(f"{number + 1}: {stage.model}") for number, stage in enumerate(check.stages)]
    texts = [
        f" {100 * stage.share:.1f} % of the images"
        + ("" if stage.accuracy is None else f", {100 * stage.accuracy:.1f} % right")
        for stage in check.stages
    ]
    line_inches = max(0.42, 0.2 * max(1 + name.count("\n") for name in names))
    height = 1.2 + line_inches * len(names)
    figure = new_figure(WIDTH, height, theme, "Where images stop")
    left = 0.3 + max(text_width(figure, name, 9.5) for name in names)
    room = WIDTH - left - 0.15
    width = min(
        (room - text_width(figure, text, 9)) / max(stage.share, 0.3)
        for text, stage in zip(texts, check.stages, strict=True)
    )
    axes = figure.add_axes((left / WIDTH, 0.15 / height, min(width, room) / WIDTH, (height - 0.75) / height))
    bare(axes, theme, None)
    for number, (stage, text) in enumerate(zip(check.stages, texts, strict=True)):
        axes.barh(number, 100 * stage.share, color=CASCADE[theme.dark], height=0.55)
        axes.text(100 * stage.share, number, text, color=theme.text, fontsize=9, va="center")
    axes.set_xlim(0, 100)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xticks([])
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
