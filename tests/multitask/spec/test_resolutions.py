"""An entry of a job spec with several resolutions: the tasks that it stands for, and the tensors that they share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import multitask
import patches
from multitask.job.groups import Group, plan_groups
from multitask.job.job import Job
from multitask.spec.errors import SpecError
from multitask.spec.reading import dump_spec, dump_yaml, load_spec, load_task
from multitask.spec.schema import JobSpec
from tests.conftest import run_engine
from tests.multitask.spec.test_spec import SPEC, TASK

MakeSpec = Callable[..., JobSpec]
ENTRY = {"name": "pets", "data": "somewhere", "resolution": [16, 24, 32]}
NAMES = ("pets@16", "pets@24", "pets@32")


def load(*tasks: Any, **changes: Any) -> JobSpec:
    return load_spec({**SPEC, "tasks": list(tasks), **changes})


def error_of(*tasks: Any, **changes: Any) -> str:
    with pytest.raises(SpecError) as caught:
        load(*tasks, **changes)
    return str(caught.value)


def group_spec(make_spec: MakeSpec, method: str, **changes: Any) -> JobSpec:
    """The tests' small job with one data set at 8, 10 and 12 px."""
    return make_spec({"pets": {"resolution": [8, 10, 12], "method": method, "num_classes": None}}, **changes)


def test_a_list_of_resolutions_makes_one_task_of_each_alike_in_all_else() -> None:
    spec = load({**ENTRY, "batch_size": 7, "augment": "crop_flip"})

    alike = [{**ENTRY, "method": "scale_bias", "batch_size": 7, "augment": "crop_flip"}] * 3
    written_out = [
        {**task, "name": f"pets@{size}", "resolution": size} for task, size in zip(alike, (16, 24, 32), strict=True)
    ]
    assert tuple(task.name for task in spec.tasks) == NAMES
    assert spec == load(*written_out)


def test_tasks_keep_the_order_of_the_file() -> None:
    spec = load({**TASK, "name": "first"}, ENTRY, {**TASK, "name": "last"})

    assert tuple(task.name for task in spec.tasks) == ("first", *NAMES, "last")


def test_the_list_may_stand_in_the_defaults_and_the_method_too() -> None:
    entries = [{"name": name, "data": "somewhere"} for name in ("pets", "cars")]

    spec = load(*entries, task_defaults={"resolution": [16, 24], "method": "full"})

    assert [task.name for task in spec.tasks] == ["pets@16", "pets@24", "cars@16", "cars@24"]
    assert {task.method for task in spec.tasks} == {"full"}


def test_a_variant_of_a_file_changes_the_whole_group(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**SPEC, "tasks": [{**ENTRY, "data": "./pets"}]}))
    (tmp_path / "variant.yaml").write_text("base: base.yaml\ntask_defaults: {batch_size: 3}\n")

    spec = load_spec(tmp_path / "variant.yaml")

    assert {(task.batch_size, task.data) for task in spec.tasks} == {(3, str(tmp_path / "pets"))}
    assert len(spec.tasks) == 3


def test_a_group_survives_a_round_trip_as_its_tasks() -> None:
    spec = load(ENTRY)

    assert load_spec(dump_spec(spec)) == load_spec(yaml.safe_load(dump_yaml(spec))) == spec
    assert load_spec(spec, {"steps": 7}).tasks == spec.tasks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": []}, "tasks[1].resolution: expected one or more resolutions, each only once, found []"),
        (
            {"resolution": [16, 16]},
            "tasks[1].resolution: expected one or more resolutions, each only once, found [16, 16]",
        ),
        ({"resolution": [16, 4]}, "tasks[1].resolution: Input should be greater than or equal to 8, found 4"),
        ({"resolution": [16, "big"]}, "tasks[1].resolution: Input should be a valid integer"),
        ({"batch_size": 0}, "tasks[1].batch_size: Input should be greater than or equal to 1, found 0"),
        ({"metod": "full"}, "tasks[1].metod: unknown key; did you mean method?"),
        ({"name": None}, "tasks[1].name: Input should be a valid string"),
        ({"num_classes": 9}, "set backbone.num_classes: 9 and no num_classes here"),
        ({"num_classes": 9, "method": "shared"}, "tasks[1].num_classes: with method 'shared' all resolutions share"),
    ],
)
def test_an_error_names_the_entry_of_the_file_once(change: dict[str, Any], message: str) -> None:
    first = {**ENTRY, "name": "first", "resolution": [8, 9]}

    found = error_of(first, {**ENTRY, **change})

    assert message in found
    assert len(found.splitlines()) == 1, found


def test_an_error_after_a_group_names_its_own_entry() -> None:
    assert "tasks[1].batch_size" in error_of(ENTRY, {**TASK, "name": "cars", "batch_size": 0})


def test_a_task_of_the_same_name_is_refused() -> None:
    assert "['pets@24'] appear more than once" in error_of(ENTRY, {**TASK, "name": "pets@24"})


def test_resolutions_may_own_their_last_layers() -> None:
    spec = load({**ENTRY, "method": "scale_bias+last_layer", "num_classes": 9})

    assert {task.num_classes for task in spec.tasks} == {9}


def test_one_task_that_joins_a_job_has_one_resolution(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({**ENTRY, "method": "scale_bias"}))

    with pytest.raises(SpecError, match="resolution: Input should be a valid integer"):
        load_task(tmp_path / "task.yaml")


# The tensors that the resolutions share.


def names_of(groups: dict[str, Group]) -> dict[str, set[str]]:
    return {name: {slot.name for slot in group.layout.slots} for name, group in groups.items()}


def test_by_default_scales_biases_and_statistics_are_private_and_all_else_is_shared(make_spec: MakeSpec) -> None:
    job = Job(group_spec(make_spec, "scale_bias"))

    names = names_of(job.groups)
    every = set(job.backbone.network.state_dict())
    norms = {name for name in every if name.rpartition(".")[0] in job.backbone.batch_norms()}
    tasks = ("pets@8", "pets@10", "pets@12")
    assert names == {f"shared:{'+'.join(tasks)}": every - norms} | {f"private:{task}": norms for task in tasks}
    assert {"classifier.1.weight", "classifier.1.bias"} <= names["shared:pets@8+pets@10+pets@12"]


def test_all_shared_is_one_group_statistics_too(make_spec: MakeSpec) -> None:
    job = Job(group_spec(make_spec, "shared"))

    assert names_of(job.groups) == {"shared:pets@8+pets@10+pets@12": set(job.backbone.network.state_dict())}


def test_all_private_has_a_group_for_each_resolution(make_spec: MakeSpec) -> None:
    job = Job(group_spec(make_spec, "full"))

    every = set(job.backbone.network.state_dict())
    assert names_of(job.groups) == {f"private:pets@{size}": every for size in (8, 10, 12)}


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("method", "parameters", "floats"), [("scale_bias", 34_112, 68_224), ("shared", 0, 0)])
def test_a_resolution_of_mobilenet_v2_costs_its_patch_and_no_more(
    count: int, method: str, parameters: int, floats: int
) -> None:
    """The backbone has 3,504,872 parameters, and as many running means and variances as one patch has parameters."""
    backbone = patches.load_backbone("mobilenet_v2", num_classes=1000)
    models = {}
    for task in range(count):
        models[f"task{task}"] = patches.attach(backbone, method).train()
        models[f"task{task}"].set_shared_trainable(True)

    groups = plan_groups(models, dict.fromkeys(models, 1))

    trained = sum(slot.size for group in groups for slot in group.layout.trained_slots())
    stored = sum(tensor.numel() for group in groups for tensor in group.tensors(None).values() if tensor.dim())
    assert trained == 3_504_872 + (count - 1) * parameters
    assert stored == 3_538_984 + (count - 1) * floats


def test_one_decode_feeds_all_resolutions(make_spec: MakeSpec) -> None:
    job = Job(group_spec(make_spec, "scale_bias", task_defaults={"augment": "crop_flip"}))
    together = list(job.workers)
    stream = job.make_stream(together)

    drawn = {name: stream.next(name) for name in together for _ in range(2)}

    assert job.sharing(job.workers) == [together]
    assert stream.decoded == 2
    assert [next(iter(batch.pixels)) for batch in drawn.values()] == [8, 10, 12]


@pytest.mark.parametrize("method", ["scale_bias", "shared", "full"])
def test_a_group_trains_and_its_bundles_load(make_spec: MakeSpec, method: str) -> None:
    run = multitask.train(group_spec(make_spec, method))

    export = run.export()
    backbone = patches.load_backbone("mobilenet_v2", export.backbone, **run.spec.backbone.options, num_classes=4)
    _, models = run.models()
    assert set(export.bundles) == {"pets@8", "pets@10", "pets@12"}
    for name, path in export.bundles.items():
        loaded = patches.load_bundle(path, backbone)
        x = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))
        assert torch.equal(loaded(x), models[name](x))
        assert patches.inspect_bundle(path).preprocessing["resolution"] == int(name.partition("@")[2])


def test_with_nothing_private_the_tasks_are_one_network(make_spec: MakeSpec) -> None:
    job = Job(group_spec(make_spec, "shared"))

    backbone, private = job.state(run_engine(job).outcome.versions["last"].groups)

    start = job.backbone.network.state_dict()
    assert private == {"pets@8": {}, "pets@10": {}, "pets@12": {}}
    assert not torch.equal(backbone["features.0.1.running_mean"], start["features.0.1.running_mean"])


@pytest.mark.parametrize("method", ["shared", "norm_statistics"])
def test_a_task_that_trains_nothing_is_refused(make_spec: MakeSpec, method: str) -> None:
    with pytest.raises(SpecError, match=f"'pets@8': method '{method}' owns no parameter.*train_shared: true"):
        Job(group_spec(make_spec, method, train_shared=False))
