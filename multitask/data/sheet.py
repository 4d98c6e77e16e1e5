"""A picture of a table's first images with their class names."""

import io
from itertools import chain, islice

import matplotlib.figure
import numpy as np

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
    columns = min(columns, len(rows))
    lines = -(-len(rows) // columns)
    figure = matplotlib.figure.Figure(figsize=(columns * CELL_INCHES, lines * (CELL_INCHES + 0.25)), dpi=120)
    for axes in figure.subplots(lines, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, (encoded, label) in zip(figure.axes, rows, strict=False):
        axes.set_title(_shortened(table.classes[label]), fontsize=7, pad=3)
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
