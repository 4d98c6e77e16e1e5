"""Pictures of a table's images with their class names."""

import io
from collections.abc import Sequence
from itertools import chain, islice

import matplotlib.figure
import numpy as np
from torch import Tensor

from multitask.data.storage import DataError
from multitask.data.table import ImageTable
from multitask.data.transforms import decode

CELL_INCHES = 1.3


def contact_sheet(table: ImageTable, images: int, columns: int = 8) -> bytes:
    """PNG of the first images, each under its class name; one that cannot be decoded is a grey field that says so.

    Args:
        images: how many, 1 or more; all where the table has fewer.
    """
    if images < 1:
        raise DataError(f"{images} images: expected 1 or more. Ask for more.")
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
    """PNG of encoded images under their titles, line by line; None leaves a place empty.

    Args:
        cells: one or more images, each encoded, shape (bytes,), uint8, with its title.
    """
    lines = -(-len(cells) // columns)
    figure = matplotlib.figure.Figure(figsize=(columns * CELL_INCHES, lines * (CELL_INCHES + 0.25)), dpi=120)
    for axes in figure.subplots(lines, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, cell in zip(figure.axes, cells, strict=False):
        if cell is None:
            continue
        encoded, title = cell
        axes.set_title(_shortened(title), fontsize=7, pad=3)
        try:
            axes.imshow(decode(encoded).permute(1, 2, 0).numpy())
        except RuntimeError:
            axes.imshow(np.full((1, 1, 3), 200, np.uint8))
            axes.text(0, 0, "cannot be\ndecoded", ha="center", va="center", fontsize=7)
    figure.tight_layout(pad=0.4)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _shortened(name: str, length: int = 18) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
