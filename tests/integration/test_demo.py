"""The demo at full length keeps its promises about its numbers."""

import json
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch

import patches
from jobs.demo.run import run_demo
from multitask.cascade import CascadeModel, read_predictions
from multitask.cascade.cascade import answers_of
from multitask.data import open_table
from multitask.run.directory import Run
from patches.images.decoding import decode

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
TASKS = ["fashion", "animals", "digits"]
RESOLUTIONS = [f"fashion@{size}" for size in (10, 14, 20, 28)]


@pytest.mark.timeout(1800)  # four trainings; where cores are few, Ray starts its processes slowly
def test_private_scale_and_bias_matches_three_models_and_a_cascade_its_best_resolution(tmp_path: Path) -> None:
    report = run_demo(tmp_path / "demo")

    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    modes = results["modes"]
    accuracy = {name: mean(mode["tasks"][task]["top1"] for task in TASKS) for name, mode in modes.items()}
    assert accuracy["private_scale_bias"] >= accuracy["independent"] - 1.0
    assert accuracy["private_scale_bias"] >= accuracy["private_last_layer"] + 5.0
    assert accuracy["private_scale_bias"] >= accuracy["private_last_layer_reestimated"] - 0.5
    assert modes["private_scale_bias"]["parameters"] < 0.5 * modes["independent"]["parameters"]
    assert modes["private_scale_bias"]["bytes"] < modes["independent"]["bytes"]

    for name in ("private_scale_bias", "private_last_layer"):
        tasks = modes[name]["tasks"]
        assert {task["engine"] for task in tasks.values()} == {"async"}
        assert len({task["process_id"] for task in tasks.values()}) == 3
        assert len({task["pushes"] for task in tasks.values()}) == 1
        assert all(task["mean_staleness"] > 0 for task in tasks.values())

    backbone_file = Path(results["backbone"]["path"])
    assert backbone_file.stat().st_size == results["backbone"]["bytes"]
    for task in TASKS:
        bundle = results["bundles"][task]
        # To the last digit: the fresh process computes what the trainer computed.
        assert bundle["top1"] == modes["private_scale_bias"]["tasks"][task]["top1"]
        assert Path(bundle["path"]).stat().st_size == bundle["bytes"]
        fits = patches.inspect_bundle(bundle["path"]).backbone
        backbone = patches.load_backbone(fits["name"], backbone_file, **fits["options"])
        assert backbone.content_hash() == results["backbone"]["hash"]
        patches.verify_bundle(bundle["path"], backbone)

    cascade = results["cascade"]
    assert [single["model"] for single in cascade["singles"]] == RESOLUTIONS  # from cheap to dear
    assert cascade["images"] == 10_000
    # One short training with thresholds from few images; chance decides which resolution is the one to beat.
    # What cascades save is for benchmarks/resolutions.py to say.
    assert cascade["accuracy_gain"]["mean"] >= -0.015
    assert cascade["saving"]["low"] > 0
    assert cascade["saving_against_equal"]["low"] > 0
    assert sum(stage["share"] for stage in cascade["stages"]) == pytest.approx(1.0)
    package = tmp_path / "demo" / "fashion.cascade"
    assert Path(cascade["path"]) == package
    check_package(package, Run(tmp_path / "demo" / "resolutions"), [stage["model"] for stage in cascade["stages"]])

    assert report == tmp_path / "demo" / "report.html"
    page = report.read_text()
    assert "data:image/png;base64," in page
    for text in ("cascade_stages", "Images that stop at each stage", str(package), *RESOLUTIONS):
        assert text in page
    for picture in ("accuracy_parameters", "accuracy_cost", "stage_shares", "stages"):
        assert (report.parent / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def check_package(package: Path, run: Run, stages: list[str]) -> None:
    """Check that the cascade loads, and that it answers images as the predictions on which it was checked say."""
    model = CascadeModel.load(package)
    point = model.cascade.point()
    assert [stage.model for stage in point.stages] == stages
    assert len(stages) > 1
    table = open_table(run.spec.tasks[0].data + "/test")
    rows = np.arange(64)
    answers = model([decode(torch.frombuffer(bytearray(table.row(row).image), dtype=torch.uint8)) for row in rows])
    expected = answers_of(point, read_predictions(run.directory / "predictions" / "test").take(rows))
    for name in ("labels", "stages", "costs"):
        np.testing.assert_array_equal(getattr(answers, name), getattr(expected, name))
