"""Contact sheets: pictures that show images of a table with their class names."""

import io
import textwrap
from collections.abc import Sequence
from itertools import chain, islice

import matplotlib.figure
import numpy as np
from matplotlib.font_manager import FontProperties, findfont, get_font
from torch import Tensor

from multitask.data.storage import DataError
from multitask.data.table import ImageTable
from patches.images.decoding import decode

CELL_INCHES = 1.3
"""Width and height of one image on the sheet."""
TITLE_CHARACTERS, TITLE_LINES = 20, 4
"""Largest size of a title above an image."""


def contact_sheet(table: ImageTable, images: int, columns: int = 8) -> bytes:
    """Return a PNG of the first images of a table, each under its class name.

    Args:
        table: the table.
        images: number of images, 1 or more. A smaller table is shown completely.
        columns: number of images in a line.
    Raises:
        DataError: `images` is below 1, or a shard cannot be read.
    """
    if images < 1:
        raise DataError(f"The number of images is {images}, expected 1 or more. Ask for a larger number.")
    rows = list(
        islice(
            chain.from_iterable(
                ((group.encoded(i), int(group.labels[i])) for i in range(len(group))) for group in table.groups()
            ),
            images,
        )
    )
    return picture_grid([(encoded, table.classes[label]) for encoded, label in rows], min(columns, len(rows)))


def picture_grid(cells: Sequence[tuple[Tensor, str] | None], columns: int) -> bytes:
    """Return a PNG that shows images under their titles, line by line.

    An image that cannot be decoded is replaced by a grey field that says so.

    Args:
        cells: one or more pairs of an encoded image, shape (bytes,), uint8, and its title. None leaves a place empty.
        columns: number of images in a line.
    """
    lines = -(-len(cells) // columns)
    titles = [_title(cell[1]) if cell else "" for cell in cells]
    title_inches = 0.14 + 0.11 * (1 + max(title.count("\n") for title in titles))
    size = (columns * CELL_INCHES, lines * (CELL_INCHES + title_inches))
    figure = matplotlib.figure.Figure(figsize=size, dpi=120)
    for axes in figure.subplots(lines, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, cell, title in zip(figure.axes, cells, titles, strict=False):
        if cell is None:
            continue
        axes.set_title(title, fontsize=7, pad=3, parse_math=False)
        try:
            axes.imshow(decode(cell[0]).permute(1, 2, 0).numpy())
        except RuntimeError:
            axes.imshow(np.full((1, 1, 3), 200, np.uint8))
            axes.text(0, 0, "cannot be\ndecoded", ha="center", va="center", fontsize=7)
    figure.tight_layout(pad=0.4)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _title(text: str) -> str:
    """Return a title as it is drawn: a long one takes several lines."""
    return "\n".join(textwrap.wrap(_drawable(text), TITLE_CHARACTERS, max_lines=TITLE_LINES, placeholder="…"))


def _drawable(text: str) -> str:
    """Replace characters that matplotlib's font does not have by their numbers, such as U+732B."""
    font = get_font(findfont(FontProperties()))
    return "".join(c if font.get_char_index(ord(c)) else f"U+{ord(c):04X}" for c in text)
