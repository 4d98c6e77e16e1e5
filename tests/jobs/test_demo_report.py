"""The demo's report: one HTML file that needs no other file, with the numbers of the results."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from jobs.demo.report import accuracy_table, headline, modes, write_report
from tests.conftest import png


def make_results(**changes: Any) -> dict[str, Any]:
    def mode(title: str, parameters: int, top1: tuple[float, float], trained: bool = True) -> dict[str, Any]:
        tasks = {}
        for task, value in zip(("pets", "cars"), top1, strict=True):
            tasks[task] = {"top1": value, "top5": 99.0, "loss": 0.5}
            if trained:
                curve = [{"step": step, "top1": value - 10 / step, "loss": 1.0} for step in (1, 2, 3)]
                tasks[task] |= {"engine": "async", "process_id": 4711, "pushes": 1300, "mean_staleness": 0.75}
                tasks[task]["curve"] = curve
        return {"title": title, "parameters": parameters, "bytes": 4 * parameters, "tasks": tasks}

    return {
        "title": "Two tasks",
        "seconds": 61.5,
        "seed": 3,
        "environment": {"python": "3.11", "torch": "2", "ray": "2", "cores": 2, "device": "cpu", "commit": "abc1234"},
        "tasks": {
            task: {
                "classes": ["a", "b"],
                "resolution": 16,
                "train_images": 123_456,
                "validation_images": 10,
                "test_images": 20,
                "licence": f"licence of {task}",
                "examples": [{"png": png(0, 1), "label": "a label"}],
            }
            for task in ("pets", "cars")
        },
        "modes": {
            "private_scale_bias": mode("private scale-and-bias", 1100, (90.0, 80.0)),
            "private_last_layer": mode("private last layer", 1000, (70.0, 66.5)),
            "private_last_layer_reestimated": mode("re-estimated", 1000, (88.0, 81.0), trained=False),
            "independent": mode("independent models", 2000, (90.5, 80.5)),
        },
        "backbone": {"path": "run/backbone.safetensors", "bytes": 4000, "hash": "f00d"},
        "bundles": {task: {"path": f"run/{task}.patch", "bytes": 200, "top1": 12.5} for task in ("pets", "cars")},
        **changes,
    }


def test_the_file_stands_alone_and_holds_the_numbers(tmp_path: Path) -> None:
    html = write_report(make_results(), tmp_path).read_text()

    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|#)""", html)
    assert "url(" not in html
    for text in (
        "90.0",
        "66.5",
        "85.0",
        "1,100",
        "1,300",
        "4711",
        "0.75",
        "123,456",
        "licence of cars",
        "a label",
        "f00d",
    ):
        assert text in html
    assert "patches.load_bundle(bundle, backbone)" in html
    assert "measured anew for each task" in html


def test_the_plots_stand_beside_it_and_are_no_blank_sheets(tmp_path: Path) -> None:
    write_report(make_results(), tmp_path)

    plots = {path.name: np.asarray(Image.open(path)) for path in tmp_path.glob("*.png")}

    assert set(plots) == {"accuracy_parameters.png", "learning_curves.png", "sizes.png"}
    for pixels in plots.values():
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50


def test_terminal_and_report_show_the_same_rows() -> None:
    results = make_results()
    output = io.StringIO()

    Console(file=output, width=140).print(accuracy_table(results))

    rows = modes(results)
    assert [row.mean for row in rows] == [85.0, 68.25, 84.5, 85.5]
    for row in rows:
        line = next(line for line in output.getvalue().splitlines() if row.title in line)
        assert all(cell in line for cell in row.cells())


def test_the_headline_is_computed_from_the_rows() -> None:
    assert headline(make_results()) == (
        "Private scale-and-bias patches reach 85.0 % mean top-1 on 2 tasks with 1,100 parameters, 55 % of what "
        "separate models take: 0.5 points below those; 0.5 points above the fair baseline."
    )


def test_names_are_escaped(tmp_path: Path) -> None:
    results = make_results(title="<script>alert(1)</script>")
    results["tasks"]["<em>cars"] = results["tasks"].pop("cars")
    for mode in results["modes"].values():
        mode["tasks"]["<em>cars"] = mode["tasks"].pop("cars")

    html = write_report(results, tmp_path).read_text()

    assert "<script>alert" not in html
    assert "<em>cars" not in html


def test_missing_parts_are_left_out(tmp_path: Path) -> None:
    results = make_results()
    del results["backbone"], results["bundles"]
    results["modes"] = {"private_last_layer_reestimated": results["modes"]["private_last_layer_reestimated"]}

    html = write_report(results, tmp_path).read_text()

    assert "load_bundle" not in html
    assert {path.name for path in tmp_path.glob("*.png")} == {"accuracy_parameters.png"}


def test_results_without_modes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold no modes"):
        write_report(make_results(modes={}), tmp_path)
