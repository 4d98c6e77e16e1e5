"""Labels and sizes in the figures of reports."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.cbook import is_math_text

from multitask.report.plots import LIGHT, human_bytes, new_figure, plain, png, spread


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.floats(0.1, 10))
def test_labels_never_overlap_and_keep_their_order(wanted: list[float], gap: float) -> None:
    placed = spread(wanted, gap, 0.0, 100.0)

    ordered = [placed[index] for index in sorted(range(len(wanted)), key=wanted.__getitem__)]
    assert all(after - before >= gap - 1e-6 for before, after in pairwise(ordered))
    assert all(gap / 2 - 1e-6 <= place <= 100 - gap / 2 + 1e-6 for place in placed)


@pytest.mark.parametrize("name", ["$x$ and $", r"cost \$5$", "a_b^c", "[x] [/red]"])
def test_a_name_is_drawn_as_it_is_and_not_as_a_formula(name: str) -> None:
    figure = new_figure(4, 2, LIGHT, name)
    (heading,) = figure.texts
    assert not is_math_text(heading.get_text())
    assert heading.get_text().replace(r"\$", "$") == name, "matplotlib writes a dollar sign like this"


def test_characters_that_the_font_lacks_become_their_numbers(recwarn: pytest.WarningsRecorder) -> None:
    assert plain("猫 Müller\n") == "U+732B Müller\n"
    assert png(new_figure(4, 2, LIGHT, "猫"))[:4] == b"\x89PNG"
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (54_321, "54.3 kB"), (1_000_000, "1.0 MB")])
def test_sizes_are_readable(size: int, text: str) -> None:
    assert human_bytes(size) == text
