"""The papers' settings: two steps of each shipped spec on a generated table."""

from collections.abc import Callable
from pathlib import Path

import pytest

import multitask
from multitask.spec.reading import dump_spec, load_spec

SPECS = Path(__file__).parents[2] / "jobs" / "specs"


@pytest.mark.parametrize("name", ["imagenet_places", "imagenet_resolutions", "transfer"])
def test_two_steps_of_the_papers_settings(name: str, make_data: Callable[..., str], tmp_path: Path) -> None:
    """Everything is from the spec except data, batch size, engine, and weights that cannot be downloaded."""
    raw = dump_spec(load_spec(SPECS / f"{name}.yaml"))
    classes = {task["name"]: task["num_classes"] or raw["backbone"]["num_classes"] for task in raw["tasks"]}
    data = {count: make_data(classes=count, rows=5, size=96) for count in set(classes.values())}
    raw["tasks"] = [task | {"data": data[classes[task["name"]]], "batch_size": 2} for task in raw["tasks"]]
    raw["backbone"]["weights"] = None
    raw |= {"steps": 2, "evaluate_every": 2, "engine": {"name": "local"}, "directory": str(tmp_path / "run")}

    run = multitask.train(raw)

    assert {task["pushes"] for task in run.result["tasks"].values()} == {2}
    assert set(run.result["last"]["tasks"]) == {task.name for task in run.spec.tasks}


def test_the_papers_settings() -> None:
    places = load_spec(SPECS / "imagenet_places.yaml")
    resolutions = load_spec(SPECS / "imagenet_resolutions.yaml")
    transfer = load_spec(SPECS / "transfer.yaml")

    assert {task.name: task.resolution for task in places.tasks} == {"imagenet": 224, "places365": 256}
    assert {task.name: task.resolution for task in resolutions.tasks} == {
        f"imagenet@{resolution}": resolution for resolution in (96, 128, 160, 192, 224)
    }
    # The five resolutions share one head and one schedule, and all of them train the convolutions.
    assert {(task.method, task.num_classes) for task in resolutions.tasks} == {("scale_bias", None)}
    assert transfer.backbone.name == "inception_v3"
    assert not transfer.train_shared
    for spec in (places, resolutions, transfer):
        assert (spec.engine.name, spec.optimizer.name, spec.optimizer.rate) == ("async", "rmsprop", 0.045)
        assert (spec.schedule.name, spec.schedule.factor) == ("exponential", 0.98)


def test_the_demos_resolutions_share_all_but_scales_biases_and_statistics() -> None:
    spec = load_spec(SPECS / "demo_resolutions.yaml")

    assert {task.name: task.resolution for task in spec.tasks} == {f"fashion@{size}": size for size in (10, 14, 20, 28)}
    assert {(task.method, task.num_classes) for task in spec.tasks} == {("scale_bias", None)}
    assert spec.train_shared
