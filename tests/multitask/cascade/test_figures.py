"""The words and the pages about a cascade: the numbers of its check."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.demo.report import write_report
from multitask.cascade import Check, OperatingPoint, Predictions, figures, fit_and_check
from multitask.cascade.checking import Interval
from multitask.cascade.figures import accuracy_cost, headline, model_rows, section, stage_rows, stage_sheet
from multitask.cascade.greedy import Stage
from multitask.cascade.rules import Rule
from multitask.data import open_table
from multitask.report.plots import DARK, LIGHT
from tests.conftest import MakeData, png
from tests.jobs.test_demo_report import make_results
from tests.multitask.cascade.pools import costs_of_pool, make_predictions


@pytest.fixture(scope="module")
def checked() -> Check:
    return fit_and_check(make_predictions(2000), costs_of_pool(), operating_points=5)[1]


def test_the_headline_states_gain_and_saving_with_their_intervals(checked: Check) -> None:
    told = replace(
        checked,
        accuracy=Interval(0.905, 0.9, 0.91),
        accuracy_gain=Interval(-0.0012, -0.003, 0.0006),
        saving=Interval(0.4, 0.39, 0.41),
        saving_against_equal=Interval(0.1, 0.08, 0.12),
        equal=checked.singles[1],
    )
    assert headline(told) == (
        "The cascade answers 90.5 % of 1,000 images rightly, -0.12 points (-0.30 to +0.06) against model 'large', for "
        "40.0 % fewer MACs (39.0 to 41.0). Against 'middle', the cheapest single model about as accurate, the saving "
        "is 10.0 % (8.0 to 12.0)."
    )


def test_the_tables_have_a_line_for_each_stage_and_each_model(checked: Check) -> None:
    assert [line[1] for line in stage_rows(checked)] == [stage.model for stage in checked.stages]
    assert stage_rows(checked)[-1][2] == "always answers"
    assert [line[0] for line in model_rows(checked)] == ["cascade", "small", "middle", "large (reference)"]


def test_the_curve_is_drawn_in_both_themes(checked: Check) -> None:
    light, dark = (np.asarray(Image.open(io.BytesIO(accuracy_cost(checked, theme)))) for theme in (LIGHT, DARK))
    assert light.shape == dark.shape
    assert light[0, 0, :3].mean() > 200 > 60 > dark[0, 0, :3].mean()
    assert len(np.unique(light.reshape(-1, light.shape[-1]), axis=0)) > 50


def test_the_report_of_a_run_takes_a_section_about_its_cascade(checked: Check, tmp_path: Path) -> None:
    without = write_report(make_results(), tmp_path / "without").read_text()
    about = section(checked, png(0, 1), "runs/my.cascade")
    page = write_report(make_results(cascade=about), tmp_path / "with").read_text()

    assert "cascade_stages" not in without
    assert "cascade_stages" in page
    assert headline(checked).replace("'", "&#39;") in page
    assert page.count("data:image/png;base64,") == without.count("data:image/png;base64,") + 5
    assert "runs/my.cascade" in page
    pictures = {folder: {path.name for path in (tmp_path / folder).glob("*.png")} for folder in ("without", "with")}
    assert pictures["with"] - pictures["without"] == {"accuracy_cost.png", "stage_shares.png", "stages.png"}


def test_a_line_of_the_sheet_has_the_first_images_that_a_stage_answers(
    make_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = open_table(make_data(classes=4, rows=24) + "/test")
    labels = table.labels()
    sure = np.arange(24) < 20
    small = np.where(sure[:, None], 5.0, 0.1) * np.eye(4)[labels]
    large = 5.0 * np.eye(4)[np.where(labels == 3, 0, labels)]  # takes the last class for the first
    logits = {"small": small.astype(np.float32), "large": large.astype(np.float32)}
    gap = Rule("top2_gap")
    point = OperatingPoint(1.0, (Stage("small", gap, 1.0, 1.0, 20, 20), Stage("large", gap, None, 9.0, 4, 3)))
    monkeypatch.setattr(figures, "picture_grid", lambda cells, columns: (cells, columns))

    sheet: Any = stage_sheet(table, Predictions(np.arange(24), labels, logits), point)

    cells, columns = sheet
    first, second = cells[:columns], cells[columns:]
    assert [title for _, title in first] == 2 * [f"1: class {label}" for label in range(4)]
    assert [title for _, title in second[:4]] == ["2: class 0", "2: class 1", "2: class 2", "2: class 3 ≠ class 0"]
    assert second[4:] == 4 * [None]
    shown = [image.numpy().tobytes() for image, _ in [*first, *second[:4]]]
    assert shown == [table.row(row).image for row in (*range(8), *range(20, 24))]

    order = ("class 3", "class 1", "class 0", "class 2")
    columns_of = [table.classes.index(name) for name in order]
    renamed = {model: values[:, columns_of] for model, values in logits.items()}
    reordered = Predictions(np.arange(24), np.argsort(columns_of)[labels], renamed, order)
    again: Any = stage_sheet(table, reordered, point)
    assert [cell and cell[1] for cell in again[0]] == [cell and cell[1] for cell in cells]
