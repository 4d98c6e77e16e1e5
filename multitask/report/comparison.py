"""Ways to train the same tasks, compared in a table and in figures: accuracy, parameters, bytes, learning curves.

A figure takes only modes whose accuracy is known for every task, and returns a PNG.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from multitask.report.plots import (
    POINTS_PER_INCH,
    WIDTH,
    Colour,
    Theme,
    bare,
    caption,
    human_bytes,
    human_count,
    new_figure,
    padded,
    plain,
    png,
    spread,
)

UNKNOWN = "–"
"""Table cell of a value that is not known."""
PANEL, PANEL_GAP, LEFT, COLUMN_GAP = 2.45, 0.75, 0.55, 0.45
"""Inches: height of a panel of learning curves, space between rows, left margin, space beside each panel."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way to train the tasks, with what was measured of it: a row of the table, a colour in the figures."""

    key: str
    title: str
    colour: Colour
    top1: Mapping[str, float | None]
    """Task -> percent on the test images; None if it was not measured."""
    parameters: int
    """Number of parameters of all tasks together; shared ones count once."""
    bytes: int
    """Size on disk of all tasks together."""
    curves: Mapping[str, Sequence[tuple[float, float]]]
    """Task -> (round, percent on validation images) pairs; empty for a task without a curve."""

    @property
    def mean(self) -> float | None:
        """Mean top-1 in percent, or None unless every task was measured."""
        known = [value for value in self.top1.values() if value is not None]
        return sum(known) / len(known) if known and len(known) == len(self.top1) else None

    def cells(self) -> list[str]:
        """Return the row as people read it, in the order of `header`."""
        accuracies = [UNKNOWN if value is None else f"{value:.1f}" for value in [*self.top1.values(), self.mean]]
        return [self.title, *accuracies, f"{self.parameters:,}", human_bytes(self.bytes)]


def header(tasks: Sequence[str]) -> list[str]:
    """Return the column names of the table."""
    return ["mode", *tasks, "mean", "parameters", "size"]


def terminal_table(modes: Sequence[Mode], tasks: Sequence[str], title: str, highlighted: str) -> Table:
    """Return the table for the terminal.

    Args:
        highlighted: key of the mode whose row is bold.
    """
    table = Table(title=f"Top-1 accuracy on test images, % ({Text(title).plain})", title_justify="left")
    for index, name in enumerate(header(tasks)):
        table.add_column(Text(name), justify="left" if index == 0 else "right")
    for mode in modes:
        table.add_row(*(Text(cell) for cell in mode.cells()), style="bold" if mode.key == highlighted else None)
    return table


def accuracy_parameters(modes: Sequence[Mode], tasks: Sequence[str], heading: str, theme: Theme) -> bytes:
    """Draw mean accuracy against parameters on the left, and the accuracy of every task on the right."""
    row_inches = 0.17 * len(modes) + 0.22
    height = max(4.7, row_inches * len(tasks) + 1.6)
    figure = new_figure(WIDTH, height, theme, heading)
    top, bottom = 1.05, 0.62  # inches above and below the axes for text
    left = figure.add_axes((0.06, bottom / height, 0.47, (height - top - bottom) / height))
    right = figure.add_axes((0.655, bottom / height, 0.325, (height - top - bottom) / height))
    _scatter(left, modes, theme, (height - top - bottom) * POINTS_PER_INCH)
    _task_rows(right, modes, tasks, theme)
    caption(left, "Mean top-1 accuracy against parameters of all tasks together", theme)
    caption(right, "The same, task by task", theme)
    return png(figure)


def learning_curves(modes: Sequence[Mode], tasks: Sequence[str], theme: Theme) -> bytes:
    """Draw validation accuracy over rounds, one panel for each task; at least one mode needs a curve."""
    shown = [mode for mode in modes if any(mode.curves.get(task) for task in tasks)]
    tasks = [task for task in tasks if any(mode.curves.get(task) for mode in shown)]
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    top, bottom = 1.15, 0.55  # inches above and below the panels for text
    height = rows * PANEL + (rows - 1) * PANEL_GAP + top + bottom
    figure = new_figure(WIDTH, height, theme, "Validation accuracy while training")
    _legend(figure, shown, theme, 1 - 0.62 / height)
    values = [y for mode in shown for task in tasks for _, y in mode.curves.get(task, ())]
    limits = padded(min(values), max(values))
    width = (WIDTH - LEFT - COLUMN_GAP * columns) / columns
    for index, task in enumerate(tasks):
        row, column = divmod(index, columns)
        x, y = LEFT + column * (width + COLUMN_GAP), height - top - PANEL - row * (PANEL + PANEL_GAP)
        axes = figure.add_axes((x / WIDTH, y / height, width / WIDTH, PANEL / height))
        _panel(axes, shown, task, limits, theme)
        if row == rows - 1:
            axes.set_xlabel("rounds: a step of each task still training", color=theme.muted, fontsize=9)
        if column == 0:
            axes.set_ylabel("top-1, %", color=theme.muted, fontsize=9)
    return png(figure)


def _legend(figure: Figure, modes: Sequence[Mode], theme: Theme, y: float) -> None:
    """Write the titles of the modes in their colours, side by side; `y` is a share of the figure's height."""
    x_inches = LEFT
    for mode in modes:
        colour = mode.colour[theme.dark]
        label = figure.text(x_inches / WIDTH, y, f"● {plain(mode.title)}", color=colour, fontsize=9.5, va="center")
        x_inches += label.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width / figure.dpi + 0.3


def _panel(axes: Axes, modes: Sequence[Mode], task: str, limits: tuple[float, float], theme: Theme) -> None:
    """Draw one task's learning curves, each with its last value."""
    low, high = limits
    bare(axes, theme, "y")
    axes.set_ylim(low, high)
    ends = []
    for mode in modes:
        if curve := mode.curves.get(task):
            colour = mode.colour[theme.dark]
            rounds, values = zip(*curve, strict=True)
            axes.plot(rounds, values, color=colour, linewidth=1.9, solid_capstyle="round")
            axes.plot(rounds[-1], values[-1], "o", color=colour, markersize=4)
            ends.append((colour, rounds[-1], values[-1]))
    gap = 11 * (high - low) / (PANEL * POINTS_PER_INCH)
    places = spread([value for _, _, value in ends], gap, low, high)
    for (colour, last_round, value), place in zip(ends, places, strict=True):
        _write_value(axes, value, (last_round, place), colour)
    axes.set_title(plain(task), loc="left", color=theme.text, fontsize=10.5, fontweight="bold", pad=7)


def _write_value(axes: Axes, value: float, place: tuple[float, float], colour: str) -> None:
    """Write a percentage to the right of a point."""
    axes.annotate(
        f"{value:.1f}",
        place,
        xytext=(6, 0),
        textcoords="offset points",
        color=colour,
        fontsize=8.5,
        va="center",
        annotation_clip=False,
    )


def sizes(
    backbone: int, patches: Mapping[str, int], models: int, colours: tuple[Colour, Colour], theme: Theme
) -> bytes:
    """Draw the bytes of one backbone and one patch for each task, against those of one model for each task.

    Args:
        backbone: bytes of the backbone.
        patches: task -> bytes of its patch.
        models: bytes of all separate models together.
        colours: the colour of backbone and patches, then the colour of the separate models.
    """
    patch_colour, model_colour = (colour[theme.dark] for colour in colours)
    together = backbone + sum(patches.values())
    count = len(patches)
    heading = f"{count} tasks on disk: {human_bytes(together)} against {human_bytes(models)}"
    figure = new_figure(WIDTH, 2.75, theme, heading)
    axes = figure.add_axes((0.165, 0.12, 0.72, 0.58))
    limit = max(together, models)
    edge: dict[str, Any] = {"edgecolor": theme.ground, "linewidth": 1.5, "height": 0.5}
    axes.barh(1, backbone, color=patch_colour, **edge)
    axes.text(backbone / 2, 1, "backbone", color=theme.ground, fontsize=9, ha="center", va="center", clip_on=True)
    start = backbone
    for size in patches.values():
        axes.barh(1, size, left=start, color=patch_colour, alpha=0.5, **edge)
        start += size
    for index in range(count):
        axes.barh(0, models / count, left=index * models / count, color=model_colour, **edge)
    for y, total in ((1, together), (0, models)):
        text = human_bytes(total)
        axes.text(total + limit * 0.012, y, text, color=theme.text, fontsize=10.5, fontweight="bold", va="center")
    if patches:
        average = human_bytes(round(sum(patches.values()) / count))
        axes.text(
            backbone, 1.33, f" {count} patches of {average} on average", color=patch_colour, fontsize=8.5, va="bottom"
        )
    bare(axes, theme, None)
    axes.set_xlim(0, limit)
    axes.set_ylim(-0.45, 1.6)
    axes.set_xticks([])
    axes.set_yticks(
        [1, 0], [f"1 backbone +\n{count} patches", f"{count} separate\nmodels"], fontsize=9.5, color=theme.text
    )
    return png(figure)


def _scatter(axes: Axes, modes: Sequence[Mode], theme: Theme, height_pt: float) -> None:
    """Draw a point for each mode: mean accuracy against parameters. `height_pt` is the height of the axes in points."""
    largest = max(mode.parameters for mode in modes)
    means = [mode.mean for mode in modes if mode.mean is not None]
    low, high = padded(min(means), max(means))
    bare(axes, theme, "y")
    axes.set_xlim(0, largest * 1.08)
    axes.set_ylim(low, high)
    titles = [textwrap.wrap(plain(mode.title), 46) for mode in modes]
    lines = max(len(title) for title in titles) + 1
    gap = (lines * 11.5 + 7) * (high - low) / height_pt
    places = spread(means, gap, low, high)
    left = [mode.parameters for mode in modes if mode.parameters <= largest * 0.6]
    for mode, mean, title, place in zip(modes, means, titles, places, strict=True):
        colour, to_left = mode.colour[theme.dark], mode.parameters > largest * 0.6
        # Labels to the right of their points all start at one x, where their lines end: no line crosses a label.
        x = mode.parameters - largest * 0.07 if to_left else max(left) + largest * 0.07
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "alpha": 0.7, "shrinkA": 1, "shrinkB": 6}
        axes.plot(mode.parameters, mean, "o", color=colour, markersize=10, zorder=3)
        axes.annotate(
            "\n".join([*title, f"{mean:.1f} % · {mode.parameters:,} parameters"]),
            (mode.parameters, mean),
            xytext=(x, place),
            ha="right" if to_left else "left",
            va="center",
            color=colour,
            fontsize=9,
            linespacing=1.25,
            arrowprops=line | {"relpos": (1.0 if to_left else 0.0, 0.5)},
        )
    axes.xaxis.set_major_formatter(lambda value, _: human_count(value))
    axes.set_xlabel("parameters, all tasks together", color=theme.muted, fontsize=9)
    axes.set_ylabel("mean top-1, %", color=theme.muted, fontsize=9)


def _task_rows(axes: Axes, modes: Sequence[Mode], tasks: Sequence[str], theme: Theme) -> None:
    """Draw a band for each task with the accuracy of every mode."""
    known = [value for mode in modes for value in mode.top1.values() if value is not None]
    low, high = padded(min(known), max(known))
    bare(axes, theme, "x")
    band = 0.72 / len(modes)
    for row, task in enumerate(tasks):
        for rank, mode in enumerate(modes):
            y, value, colour = row + (rank - (len(modes) - 1) / 2) * band, mode.top1[task], mode.colour[theme.dark]
            assert value is not None
            axes.plot([low, value], [y, y], color=colour, linewidth=1.2, alpha=0.35, solid_capstyle="butt")
            axes.plot(value, y, "o", color=colour, markersize=6)
            _write_value(axes, value, (value, y), colour)
    axes.set_xlim(low, high + (high - low) * 0.06)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_yticks(range(len(tasks)), [plain(textwrap.fill(task, 16)) for task in tasks])
    axes.tick_params(axis="y", labelcolor=theme.text, labelsize=9.5)
    axes.set_xlabel("top-1, %", color=theme.muted, fontsize=9)
