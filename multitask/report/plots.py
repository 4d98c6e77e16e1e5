"""What the figures of all reports have in common: themes, colours, axes, labels, and the way to a PNG.

Figures are built without pyplot, so drawing changes no global state and needs no screen.
"""

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

DPI = 160
POINTS_PER_INCH = 72
WIDTH = 10.6
"""Width of every figure in inches."""

Colour = tuple[str, str]
"""One colour in two shades: for a light and for a dark background."""
BLUE: Colour = ("#2563eb", "#6ea0ff")
AMBER: Colour = ("#d97706", "#f3a63b")
TEAL: Colour = ("#0d9488", "#3fcfbd")
GREY: Colour = ("#6b7280", "#a8b1be")
PURPLE: Colour = ("#9333ea", "#c084fc")
PINK: Colour = ("#db2777", "#f472b6")
GREEN: Colour = ("#65a30d", "#a3d65c")
BROWN: Colour = ("#b45309", "#e0a26a")
COLOURS = (BLUE, AMBER, TEAL, GREY, PURPLE, PINK, GREEN, BROWN)
"""All colours, in the order in which lines or points without a colour of their own take them."""


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of everything in a figure that carries no data, for light or for dark pages."""

    dark: bool
    """Whether this is the theme for dark pages; also the index of the shade in a `Colour`."""
    ground: str
    text: str
    muted: str
    grid: str


LIGHT = Theme(dark=False, ground="#ffffff", text="#1b2330", muted="#667085", grid="#e4e7ec")
DARK = Theme(dark=True, ground="#181d25", text="#e7eaf0", muted="#98a2b3", grid="#2c3440")


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A finished figure as two PNGs, one for light and one for dark pages."""

    name: str
    """File name without its extension."""
    words: str
    """Description for readers who cannot see the figure."""
    light: bytes
    dark: bytes


def drawn(name: str, words: str, draw: Callable[[Theme], bytes]) -> Drawn:
    """Draw a figure in both themes.

    Args:
        draw: returns the PNG of the figure in a theme.
    """
    return Drawn(name=name, words=words, light=draw(LIGHT), dark=draw(DARK))


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return centres for labels that are `gap` high, so that no label covers another.

    The labels keep the order of the wanted centres, and the sum of squared distances to the wanted centres is minimal.
    All labels stay between `low` and `high` if there is room for them; otherwise they stay above `low`.

    With rank * gap subtracted, this least-squares problem is isotonic regression, which pooling of neighbours solves.
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


def human_bytes(size: int) -> str:
    """Format a size for people in decimal units: 54321 becomes '54.3 kB'."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.95:
            break
        value, unit = value / 1000, larger
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def human_count(value: float) -> str:
    """Format a number for the labels of an axis: 150000 becomes '150k'."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:g}{unit}"
    return f"{value:g}"


def text_width(figure: Figure, text: str, fontsize: float) -> float:
    """Return the width in inches that a text takes in a figure. It may have several lines."""
    drawn = figure.text(0, 0, text, fontsize=fontsize)
    width = drawn.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width / figure.dpi
    drawn.remove()
    return width


def padded(low: float, high: float) -> tuple[float, float]:
    """Return the limits of an axis of percentages: room for labels on both sides of the values, and at most 101.5."""
    room = max(high - low, 2.0) * 0.16
    return max(low - room, 0.0), min(high + room, 101.5)


def new_figure(width: float, height: float, theme: Theme, heading: str) -> Figure:
    """Return an empty figure with its heading at the top left; width and height are inches."""
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
    """Write a caption above axes."""
    axes.set_title(text, loc="left", color=theme.muted, fontsize=9.5, pad=8)


def bare(axes: Axes, theme: Theme, grid: Literal["x", "y"] | None) -> None:
    """Remove the box and the tick marks of axes, and draw a faint grid along one direction, or none."""
    axes.set_facecolor(theme.ground)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, colors=theme.muted, labelsize=8.5)
    axes.set_axisbelow(True)
    if grid is not None:
        axes.grid(axis=grid, color=theme.grid, linewidth=0.8)


def plain(text: str) -> str:
    """Return text for matplotlib, which would read `$...$` as a formula, and has no picture of some characters.

    Characters that its font lacks, such as Chinese ones, become their numbers, such as U+732B.
    """
    font = get_font(findfont(FontProperties()))
    known = "".join(c if c.isspace() or font.get_char_index(ord(c)) else f"U+{ord(c):04X}" for c in text)
    return known.replace("$", r"\$")


def png(figure: Figure) -> bytes:
    """Render a figure as a PNG."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"facecolor": figure.get_facecolor()}
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=DPI, **options)
    return buffer.getvalue()
