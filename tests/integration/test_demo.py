"""The demo at full length, with what it promises of its numbers."""

import json
from pathlib import Path
from statistics import mean

import pytest

import patches
from jobs.demo import run_demo

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
TASKS = ["fashion", "animals", "digits"]


@pytest.mark.timeout(1800)  # three trainings; where cores are few, Ray starts its processes slowly
def test_private_scale_and_bias_matches_three_models(tmp_path: Path) -> None:
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

    assert report == tmp_path / "demo" / "report.html"
    assert "data:image/png;base64," in report.read_text()
    assert (report.parent / "accuracy_parameters.png").is_file()
