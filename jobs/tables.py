"""How the verbs print tables: no name, id or number is cut or broken, however narrow the terminal is."""

import copy
from collections.abc import Iterator

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table

GAP = 2
"""Number of spaces between columns."""
UNLIMITED = 1_000_000
"""Number of characters on a line of a pipe or a file."""


def show(*tables: Table) -> None:
    """Print tables so that every cell stands whole on one line.

    In a pipe or a file, a line is as long as it has to be. On a terminal that is too narrow, the words of a header
    stand one below the other; if that is not enough, each row becomes a block with a line for each cell.

    Brackets and colons in the names of files, tasks and classes are text here, and not rich's markup or emoji.
    """
    console = Console(markup=False, emoji=False)
    room = console.width if console.is_terminal else UNLIMITED
    console.width = UNLIMITED  # so that rich itself cuts and breaks nothing
    for number, table in enumerate(tables):
        if number > 0:
            console.print()
        if table.title is not None:
            console.print(table.title, style="bold")
        wide = _without_lines(table)
        layouts = (layout for layout in (wide, _with_high_header(wide)) if console.measure(layout).maximum <= room)
        fitting = next(layouts, None)
        console.print("\n\n".join(_blocks(table)) if fitting is None else fitting)


def _without_lines(table: Table) -> Table:
    """Return a copy of a table without its title and its lines, which take room and disturb `cut` and `awk`."""
    plain = copy.deepcopy(table)
    plain.title, plain.box, plain.pad_edge, plain.padding = None, None, False, (0, GAP, 0, 0)
    return plain


def _with_high_header(table: Table) -> Table:
    """Return a copy of a table with each word of a header on a line of its own."""
    high = copy.deepcopy(table)
    for column in high.columns:
        column.header = str(column.header).replace(" ", "\n")
    return high


def _blocks(table: Table) -> Iterator[str]:
    """Yield each row as lines of a column's name and its cell; empty cells are left out."""
    names = [str(column.header) for column in table.columns]
    width = max(map(cell_len, names)) + GAP
    for row in zip(*(map(str, column.cells) for column in table.columns), strict=True):
        yield "\n".join(f"{set_cell_size(name, width)}{cell}" for name, cell in zip(names, row, strict=True) if cell)
