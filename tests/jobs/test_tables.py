"""Tables of any content, in a pipe and on a terminal of any width."""

import io
import re
from contextlib import redirect_stdout

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from jobs.tables import show
from tests.jobs.command import Terminal

CELL = st.lists(st.sampled_from(["ab", "1.9", " ", "[/x]", ":cat:", "$", "猫", "é"]), max_size=20).map(
    lambda parts: f"x{''.join(parts)}y"
)
HEADER = st.sampled_from(["task", "images/s", "bytes per image", "share of the backbone's size", "名"])
CONTENT = st.integers(1, 6).flatmap(
    lambda columns: st.tuples(
        st.lists(HEADER, min_size=columns, max_size=columns),
        st.lists(st.lists(CELL, min_size=columns, max_size=columns), min_size=1, max_size=5),
    )
)


def printed(table: Table, width: int, to: io.StringIO) -> list[str]:
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(to):
        patch.setenv("COLUMNS", str(width))
        patch.setenv("TERM", "dumb")
        patch.setenv("LINES", "24")
        show(table)
    return [line.rstrip() for line in to.getvalue().splitlines()]


def table_of(header: list[str], rows: list[list[str]]) -> Table:
    table = Table(*header, title=f"about {rows[0][0]}")
    for row in rows:
        table.add_row(*row)
    return table


def holds(line: str, cells: list[str]) -> bool:
    """Whether a line has these cells, one after the other."""
    place = 0
    for cell in cells:
        if (found := line.find(cell, place)) < 0:
            return False
        place = found + len(cell)
    return True


@given(CONTENT, st.integers(10, 120))
@settings(max_examples=30)
def test_every_cell_stands_whole_on_a_line(content: tuple[list[str], list[list[str]]], width: int) -> None:
    header, rows = content
    title, names, *lines = printed(table_of(header, rows), width, io.StringIO())
    assert title == f"about {rows[0][0]}"
    assert holds(names, header)
    assert [holds(line, row) for line, row in zip(lines, rows, strict=True)] == [True] * len(rows)

    title, *lines = printed(table_of(header, rows), width, Terminal())
    assert title == f"about {rows[0][0]}"
    if max(map(cell_len, lines)) <= width and holds(lines[-1], rows[-1]):
        assert all(holds(line, row) for line, row in zip(lines[-len(rows) :], rows, strict=True))
    else:
        cells = [(name, cell) for row in rows for name, cell in zip(header, row, strict=True)]
        assert [tuple(re.split(r"(?<=\w)  +", line, maxsplit=1)) for line in lines if line] == cells


def test_a_pipe_gets_one_line_for_each_row() -> None:
    lines = printed(table_of(["job", "command"], [["a" * 70, "b" * 70], ["c", "d"]]), 80, io.StringIO())
    assert [line.split() for line in lines] == [
        ["about", "a" * 70],
        ["job", "command"],
        ["a" * 70, "b" * 70],
        ["c", "d"],
    ]


def test_a_header_of_several_words_makes_room_before_a_table_is_taken_apart() -> None:
    lines = printed(table_of(["bytes per image", "files"], [["123", "4"]]), 12, Terminal())
    assert lines[1:] == ["bytes", "per", "image  files", "123    4"]


def test_a_narrow_terminal_gets_a_line_for_each_cell_that_is_not_empty() -> None:
    table = Table("job", "started", "command")
    table.add_row("raysubmit_1", "", Text("multitask train a.yaml"))
    table.add_row("raysubmit_2", "today", "b")
    assert printed(table, 30, Terminal()) == [
        "job      raysubmit_1",
        "command  multitask train a.yaml",
        "",
        "job      raysubmit_2",
        "started  today",
        "command  b",
    ]
