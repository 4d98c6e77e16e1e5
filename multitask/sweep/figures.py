"""Figures of a sweep: accuracy of each method against the learning rate, and against trained parameters."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from multitask.report.plots import (
    COLOURS,
    POINTS_PER_INCH,
    WIDTH,
    Colour,
    Drawn,
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
from multitask.sweep.outcomes import Choice
from multitask.sweep.plan import show
from patches.files import write_atomic

HEIGHT, AXES, LABELS = 4.7, 3.35, 2.6
"""Inches: height of a figure, height of its axes, and room at the right edge for the names of the methods."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A method at a learning rate: the best of its settings there, as the mean over their seeds."""

    rate: float
    trained_parameters: int
    top1: float
    """Percent on validation images."""


Series = Mapping[str, Sequence[Point]]
"""Method -> its points, by rising learning rate."""


def series(choices: Sequence[Choice]) -> Series:
    """Return the points of each method, with the methods in the order of the sweep."""
    best: dict[str, dict[float, Point]] = defaultdict(dict)
    for choice in choices:
        spec = choice.trial.spec
        method, rate = " / ".join(dict.fromkeys(task.method for task in spec.tasks)), spec.optimizer.rate
        point = Point(rate=rate, trained_parameters=choice.trained_parameters, top1=choice.top1)
        if rate not in best[method] or point.top1 > best[method][rate].top1:
            best[method][rate] = point
    return {method: [points[rate] for rate in sorted(points)] for method, points in best.items()}


def draw(found: Series) -> list[Drawn]:
    """Draw both figures, or none if no setting has finished."""
    if not found:
        return []
    rates = "Validation accuracy against the learning rate, a line for each method."
    parameters = "Validation accuracy against trained parameters, a point for each method and rate."
    return [
        drawn("accuracy_rate", rates, lambda theme: accuracy_rate(found, theme)),
        drawn("accuracy_parameters", parameters, lambda theme: accuracy_parameters(found, theme)),
    ]


def write_figures(figures: Sequence[Drawn], directory: Path) -> list[Path]:
    """Write NAME.png and NAME_dark.png of each figure, and return their paths."""
    files = {}
    for figure in figures:
        files[directory / f"{figure.name}.png"] = figure.light
        files[directory / f"{figure.name}_dark.png"] = figure.dark
    for path, content in files.items():
        write_atomic(path, content)
    return list(files)


def accuracy_rate(found: Series, theme: Theme) -> bytes:
    """Return a PNG: a line for each method over a logarithmic axis of rates; a large point marks its best rate.

    Source: Mudrakarta et al., "K for the Price of 1", ICLR 2019, figure 9.
    """
    figure, axes = _begin(found, theme, "Accuracy against the learning rate")
    ends = []
    for method, colour in _theme_colours(found, theme).items():
        points = found[method]
        best = max(points, key=lambda point: point.top1)
        axes.plot([p.rate for p in points], [p.top1 for p in points], "o-", color=colour, markersize=4, linewidth=1.8)
        axes.plot(best.rate, best.top1, "o", color=colour, markersize=9)
        ends.append((points[-1].top1, f"{method}\n{best.top1:.1f} % at {show(best.rate)}", colour))
    _name(axes, ends)
    rates = sorted({point.rate for points in found.values() for point in points})
    if len(rates) <= 8:
        axes.set_xticks(rates, [show(rate) for rate in rates])
        axes.minorticks_off()
    axes.set_xlabel("learning rate", color=theme.muted, fontsize=9)
    caption(axes, "The large point of each method is its best rate", theme)
    return png(figure)


def accuracy_parameters(found: Series, theme: Theme) -> bytes:
    """Return a PNG: a point for each method and rate over a logarithmic axis of trained parameters.

    The point of a method's best rate is solid.

    Source: Mudrakarta et al., "K for the Price of 1", ICLR 2019, figure 3.
    """
    figure, axes = _begin(found, theme, "Accuracy against trained parameters")
    names = []
    for method, colour in _theme_colours(found, theme).items():
        points = found[method]
        best = max(points, key=lambda point: point.top1)
        parameters, accuracies = zip(*((point.trained_parameters, point.top1) for point in points), strict=True)
        axes.plot(parameters, accuracies, "o", color=colour, markersize=5, alpha=0.35)
        axes.plot(best.trained_parameters, best.top1, "o", color=colour, markersize=9)
        names.append((best.top1, f"{method}\n{best.top1:.1f} %, {best.trained_parameters:,} parameters", colour))
    _name(axes, names)
    counts = [point.trained_parameters for points in found.values() for point in points]
    axes.set_xlim(min(counts) / 1.5, max(counts) * 1.5)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))  # all methods may lie within one power of ten
    axes.xaxis.set_major_formatter(lambda value, _: human_count(value))
    axes.minorticks_off()
    axes.set_xlabel("parameters that are trained", color=theme.muted, fontsize=9)
    caption(axes, "A faint point for each rate, a large one for the best", theme)
    return png(figure)


def _begin(found: Series, theme: Theme, title: str) -> tuple[Figure, Axes]:
    """Return a figure with accuracies on its y axis and a logarithmic x axis."""
    figure = new_figure(WIDTH, HEIGHT, theme, title)
    axes = figure.add_axes((0.06, 0.62 / HEIGHT, 1 - 0.06 - LABELS / WIDTH, AXES / HEIGHT))
    values = [point.top1 for points in found.values() for point in points]
    bare(axes, theme, "y")
    axes.set_ylim(*padded(min(values), max(values)))
    axes.set_ylabel("validation top-1, %", color=theme.muted, fontsize=9)
    axes.set_xscale("log")
    return figure, axes


def _name(axes: Axes, names: Sequence[tuple[float, str, str]]) -> None:
    """Write each (height, text, colour) at the right edge, as near to its height as the other names allow."""
    low, high = axes.get_ylim()
    gap = 25 * (high - low) / (AXES * POINTS_PER_INCH)  # each name takes two lines
    places = spread([height for height, _, _ in names], gap, low, high)
    for (_, text, colour), place in zip(names, places, strict=True):
        axes.annotate(
            plain(text),
            (1.02, place),
            xycoords=("axes fraction", "data"),
            color=colour,
            fontsize=8.5,
            va="center",
            annotation_clip=False,
        )


def method_colours(found: Series) -> dict[str, Colour]:
    """Return the colour of each method."""
    return {method: COLOURS[index % len(COLOURS)] for index, method in enumerate(found)}


def _theme_colours(found: Series, theme: Theme) -> dict[str, str]:
    return {method: pair[theme.dark] for method, pair in method_colours(found).items()}
