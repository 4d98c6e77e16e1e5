"""Figures of a report: each function takes plain numbers and returns a PNG, in a light or a dark theme.

Figures are built without pyplot, so drawing changes no global state and needs no screen.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 160
POINTS_PER_INCH = 72
KNOWN_COLOURS = {  # mode -> its colour on light and on dark ground
    "private_scale_bias": ("#2563eb", "#6ea0ff"),
    "private_last_layer": ("#d97706", "#f3a63b"),
    "private_last_layer_reestimated": ("#0d9488", "#3fcfbd"),
    "independent": ("#6b7280", "#a8b1be"),
}
SPARE_COLOURS = (("#9333ea", "#c084fc"), ("#db2777", "#f472b6"), ("#65a30d", "#a3d65c"), ("#b45309", "#e0a26a"))


@dataclass(frozen=True, kw_only=True)
class Theme:
    dark: bool
    ground: str
    text: str
    muted: str
    grid: str


LIGHT = Theme(dark=False, ground="#ffffff", text="#1b2330", muted="#667085", grid="#e4e7ec")
DARK = Theme(dark=True, ground="#181d25", text="#e7eaf0", muted="#98a2b3", grid="#2c3440")


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way of training, as the figures need it."""

    key: str
    title: str
    parameters: int
    top1: Mapping[str, float]
    """Task -> percent."""
    mean: float
    """Percent."""
    curves: Mapping[str, Sequence[tuple[float, float]]]
    """Task -> (step, percent) pairs; a task without a curve is left out."""


def mode_colours(keys: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Mode -> its colours (on light, on dark ground), the same wherever the mode is drawn."""
    unknown = [key for key in keys if key not in KNOWN_COLOURS]
    spare = {key: SPARE_COLOURS[index % len(SPARE_COLOURS)] for index, key in enumerate(unknown)}
    return {key: KNOWN_COLOURS.get(key) or spare[key] for key in keys}


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Centres of labels `gap` high, none over another, in the order of the wanted ones and together nearest to them.

    Labels stay between `low` and `high` as far as all of them fit there.

    Least squares: with rank * gap taken off, this is isotonic regression, solved by pooling neighbours.
    """
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    pools: list[tuple[float, int]] = []  # mean, size
    for rank, index in enumerate(order):
        mean, size = wanted[index] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            other, count = pools.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        pools.append((mean, size))
    bases = [mean for mean, size in pools for _ in range(size)]
    placed = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        lowest = low + (rank + 0.5) * gap
        highest = max(high - (len(wanted) - rank - 0.5) * gap, lowest)
        placed[index] = min(max(bases[rank] + rank * gap, lowest), highest)
    return placed


def accuracy_parameters(modes: Sequence[Mode], tasks: Sequence[str], heading: str, theme: Theme) -> bytes:
    """Left: mean accuracy against total parameters. Right: the same modes, task by task, with the values."""
    colours = _theme_colours(modes, theme)
    row_inches = 0.17 * len(modes) + 0.22
    height = max(4.7, row_inches * len(tasks) + 1.6)
    figure = new_figure(10.6, height, theme, heading)
    top, bottom = 1.05, 0.62  # inches kept for words above and below the axes
    left = figure.add_axes((0.06, bottom / height, 0.47, (height - top - bottom) / height))
    right = figure.add_axes((0.655, bottom / height, 0.325, (height - top - bottom) / height))
    _scatter(left, modes, colours, theme, (height - top - bottom) * POINTS_PER_INCH)
    _task_rows(right, modes, tasks, colours, theme)
    caption(left, "Mean top-1 accuracy against parameters of all tasks together", theme)
    caption(right, "The same, task by task", theme)
    return png(figure)


def learning_curves(modes: Sequence[Mode], tasks: Sequence[str], theme: Theme) -> bytes | None:
    """Validation accuracy over rounds, a panel per task; None where no mode has a curve."""
    drawn = [mode for mode in modes if any(mode.curves.get(task) for task in tasks)]
    tasks = [task for task in tasks if any(mode.curves.get(task) for mode in drawn)]
    if not drawn:
        return None
    colours = _theme_colours(modes, theme)
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    panel, top, bottom = 2.45, 1.15, 0.55
    height = rows * panel + (rows - 1) * 0.75 + top + bottom
    figure = new_figure(10.6, height, theme, "Validation accuracy while training")
    x_inches = 0.55
    for mode in drawn:  # a key in the modes' own colours; the plots below name nothing twice
        label = figure.text(
            x_inches / 10.6, 1 - 0.62 / height, f"● {mode.title}", color=colours[mode.key], fontsize=9.5, va="center"
        )
        x_inches += label.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width / figure.dpi + 0.3
    every = [y for mode in drawn for task in tasks for _, y in mode.curves.get(task, ())]
    low, high = padded(min(every), max(every))
    width = (10.6 - 0.55 - 0.45 * columns) / columns
    for index, task in enumerate(tasks):
        row, column = divmod(index, columns)
        x, y = 0.55 + column * (width + 0.45), height - top - panel - row * (panel + 0.75)
        axes = figure.add_axes((x / 10.6, y / height, width / 10.6, panel / height))
        bare(axes, theme, "y")
        axes.set_ylim(low, high)
        ends = []
        for mode in drawn:
            if curve := mode.curves.get(task):
                rounds, values = zip(*curve, strict=True)
                axes.plot(rounds, values, color=colours[mode.key], linewidth=1.9, solid_capstyle="round")
                axes.plot(rounds[-1], values[-1], "o", color=colours[mode.key], markersize=4)
                ends.append((mode.key, rounds[-1], values[-1]))
        gap = 11 * (high - low) / (panel * POINTS_PER_INCH)
        for (key, round_, value), place in zip(ends, spread([end[2] for end in ends], gap, low, high), strict=True):
            axes.annotate(
                f"{value:.1f}",
                (round_, place),
                xytext=(6, 0),
                textcoords="offset points",
                color=colours[key],
                fontsize=8.5,
                va="center",
                annotation_clip=False,
            )
        axes.set_title(plain(task), loc="left", color=theme.text, fontsize=10.5, fontweight="bold", pad=7)
        if row == rows - 1:
            axes.set_xlabel("rounds: a step of each task still training", color=theme.muted, fontsize=9)
        if column == 0:
            axes.set_ylabel("top-1, %", color=theme.muted, fontsize=9)
    return png(figure)


def sizes(backbone: int, patches: Mapping[str, int], models: int, theme: Theme) -> bytes:
    """Bytes of one backbone and a patch per task, against those of a model per task.

    Args:
        models: bytes of all the separate models together.
    """
    patch_colour, model_colour = (
        colour[theme.dark] for colour in (KNOWN_COLOURS["private_scale_bias"], KNOWN_COLOURS["independent"])
    )
    together = backbone + sum(patches.values())
    count = len(patches)
    heading = f"{count} tasks on disk: {human_bytes(together)} against {human_bytes(models)}"
    figure = new_figure(10.6, 2.75, theme, heading)
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


def human_bytes(size: int) -> str:
    """A size for people, in decimal units: 54321 becomes '54.3 kB'."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.95:
            break
        value, unit = value / 1000, larger
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def _scatter(axes: Axes, modes: Sequence[Mode], colours: Mapping[str, str], theme: Theme, height_pt: float) -> None:
    largest = max(mode.parameters for mode in modes)
    low, high = padded(min(mode.mean for mode in modes), max(mode.mean for mode in modes))
    bare(axes, theme, "y")
    axes.set_xlim(0, largest * 1.08)
    axes.set_ylim(low, high)
    titles = [textwrap.wrap(plain(mode.title), 46) for mode in modes]
    lines = max(len(title) for title in titles) + 1
    gap = (lines * 11.5 + 7) * (high - low) / height_pt
    places = spread([mode.mean for mode in modes], gap, low, high)
    left = [mode.parameters for mode in modes if mode.parameters <= largest * 0.6]
    for mode, title, place in zip(modes, titles, places, strict=True):
        colour, to_left = colours[mode.key], mode.parameters > largest * 0.6
        # Labels right of their points start at one x and their lines end at that edge: no line crosses a label.
        x = mode.parameters - largest * 0.07 if to_left else max(left) + largest * 0.07
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "alpha": 0.7, "shrinkA": 1, "shrinkB": 6}
        axes.plot(mode.parameters, mode.mean, "o", color=colour, markersize=10, zorder=3)
        axes.annotate(
            "\n".join([*title, f"{mode.mean:.1f} % · {mode.parameters:,} parameters"]),
            (mode.parameters, mode.mean),
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


def human_count(value: float) -> str:
    """A number for an axis: 150000 becomes '150k'."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:g}{unit}"
    return f"{value:g}"


def _task_rows(
    axes: Axes, modes: Sequence[Mode], tasks: Sequence[str], colours: Mapping[str, str], theme: Theme
) -> None:
    known = [mode.top1[task] for mode in modes for task in tasks if task in mode.top1]
    low, high = padded(min(known), max(known))
    bare(axes, theme, "x")
    band = 0.72 / len(modes)
    for row, task in enumerate(tasks):
        for rank, mode in enumerate(modes):
            if task not in mode.top1:
                continue
            y, value = row + (rank - (len(modes) - 1) / 2) * band, mode.top1[task]
            axes.plot([low, value], [y, y], color=colours[mode.key], linewidth=1.2, alpha=0.35, solid_capstyle="butt")
            axes.plot(value, y, "o", color=colours[mode.key], markersize=6)
            axes.annotate(
                f"{value:.1f}",
                (value, y),
                xytext=(6, 0),
                textcoords="offset points",
                color=colours[mode.key],
                fontsize=8.5,
                va="center",
                annotation_clip=False,
            )
    axes.set_xlim(low, high + (high - low) * 0.06)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_yticks(range(len(tasks)), [textwrap.shorten(plain(t), 16, placeholder="…") for t in tasks])
    axes.tick_params(axis="y", labelcolor=theme.text, labelsize=9.5)
    axes.set_xlabel("top-1, %", color=theme.muted, fontsize=9)


def _theme_colours(modes: Sequence[Mode], theme: Theme) -> dict[str, str]:
    return {key: pair[theme.dark] for key, pair in mode_colours([mode.key for mode in modes]).items()}


def padded(low: float, high: float) -> tuple[float, float]:
    """An axis around the values with room at both ends, never above 100 percent by more than a label needs."""
    room = max(high - low, 2.0) * 0.16
    return max(low - room, 0.0), min(high + room, 101.5)


def new_figure(width: float, height: float, theme: Theme, heading: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=theme.ground)
    figure.text(
        0.15 / width,
        1 - 0.2 / height,
        textwrap.fill(plain(heading), 100),
        color=theme.text,
        fontsize=13,
        fontweight="bold",
        va="top",
    )
    return figure


def caption(axes: Axes, text: str, theme: Theme) -> None:
    axes.set_title(text, loc="left", color=theme.muted, fontsize=9.5, pad=8)


def bare(axes: Axes, theme: Theme, grid: Literal["x", "y"] | None) -> None:
    """Only what carries a number: no box, no tick marks, a faint grid along one direction."""
    axes.set_facecolor(theme.ground)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, colors=theme.muted, labelsize=8.5)
    axes.set_axisbelow(True)
    if grid is not None:
        axes.grid(axis=grid, color=theme.grid, linewidth=0.8)


def plain(text: str) -> str:
    """Text for matplotlib, which would read `$...$` as a formula."""
    return text.replace("$", r"\$")


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    options: dict[str, Any] = {"facecolor": figure.get_facecolor()}
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=DPI, **options)
    return buffer.getvalue()
