"""How the verbs print tables."""

from rich.console import Console
from rich.table import Table


def show(*tables: Table, least_width: int = 0) -> None:
    """Print tables. Brackets in the names of files, tasks and classes are text here, and not rich's markup.

    Args:
        least_width: number of characters on a line, if the terminal has fewer.
    """
    console = Console(markup=False)
    console.width = max(least_width, console.width)
    for table in tables:
        console.print(table)
