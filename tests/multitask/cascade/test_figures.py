"""The words and the pages about a cascade: the numbers of its check."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.demo.report import write_report
from multitask.cascade import Check, Costs, OperatingPoint, Predictions, figures, fit_and_check
from multitask.cascade.checking import Interval
from multitask.cascade.figures import (
    accuracy_cost,
    headline,
    model_rows,
    section,
    stage_rows,
    stage_shares,
    stage_sheet,
    undominated,
)
from multitask.cascade.greedy import Stage
from multitask.cascade.rules import Rule
from multitask.data import open_table
from multitask.data.sheet import picture_grid
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
        "The cascade answers 90.5 % (90.0 to 91.0) of 1,000 images rightly, -0.12 points (-0.30 to +0.06) against "
        "model 'large', for 40.0 % fewer MACs (39.0 to 41.0). Against 'middle', the cheapest single model that is "
        "about as accurate or better, it takes 10.0 % fewer MACs (8.0 to 12.0)."
    )


@pytest.mark.parametrize(
    ("saving", "words"),
    [
        (Interval(-0.068, -0.11, -0.021), "for 6.8 % more MACs (2.1 to 11.0)."),
        (Interval(-0.068, -0.11, 0.021), "for 6.8 % more MACs (11.0 more to 2.1 fewer)."),
        (Interval(0.012, -0.03, 0.054), "for 1.2 % fewer MACs (3.0 more to 5.4 fewer)."),
    ],
)
def test_the_headline_calls_more_cost_more(checked: Check, saving: Interval, words: str) -> None:
    assert headline(replace(checked, saving=saving, equal=checked.reference)).endswith(words)
    assert "% less energy" in headline(replace(checked, unit="energy"))


def test_the_headline_says_that_one_model_answers_alone_and_that_images_are_few() -> None:
    checked = fit_and_check(make_predictions(40), costs_of_pool(), slack=1.0)[1]
    said = headline(checked)
    assert said.startswith("No other model answers: the cascade is model 'large' alone, and answers ")
    assert "points" not in said
    assert "fewer MACs" not in said
    assert said.endswith("from 20 images. Check the cascade on 300 images or more before you rely on them.")
    assert "uncertain" not in headline(replace(checked, images=300))


def test_the_line_joins_only_operating_points_that_are_better_than_every_cheaper_one() -> None:
    curve = ((3.0, 0.8), (1.0, 0.5), (2.0, 0.7), (2.0, 0.6), (4.0, 0.8), (2.5, 0.4), (5.0, 0.9), (2.0, 0.7))
    assert undominated(curve) == [(1.0, 0.5), (2.0, 0.7), (3.0, 0.8), (5.0, 0.9)]


LONG = {
    f"{number}: $a$ rather [long] name of a task with photos of {'x' * 5 * number}": 1 + number for number in range(9)
}


@pytest.mark.parametrize(
    ("images", "pool", "slack"),
    [
        (40, {"photos_96": 1.5, "photos_160": 2.0, "photos_224": 2.4}, 0.0),
        (40, {"photos_96": 1.5, "photos_160": 2.0, "photos_224": 2.4}, 1.0),
        (4000, {"fashion_10": 1.2, "fashion_14": 1.6, "fashion_20": 2.0, "fashion_28": 2.2}, 0.0),
        (120, LONG, 0.0),
    ],
    ids=["own images", "own images, one model", "the demo", "long names"],
)
def test_no_text_is_cut_at_a_pictures_edge(images: int, pool: dict[str, float], slack: float) -> None:
    costs = Costs("MACs", {model: 3e6 * 4.0**place for place, model in enumerate(pool)})
    checked = fit_and_check(make_predictions(images, pool=pool), costs, slack=slack, operating_points=9)[1]
    for draw in (accuracy_cost, stage_shares):
        picture = np.asarray(Image.open(io.BytesIO(draw(checked, LIGHT))).convert("RGB"))
        edges = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (edges == picture[0, 0]).all(), draw.__name__


def test_long_titles_of_the_sheet_take_several_lines() -> None:
    title = "1: a class whose name is rather long ≠ another one of these"
    short, long = (Image.open(io.BytesIO(picture_grid([(torch.zeros(3), text)], 1))) for text in ("1: cat", title))
    assert long.height > short.height
    assert long.width == short.width


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
