from pathlib import Path

import pytest
import yaml

from multitask.spec.errors import SpecError
from multitask.spec.reading import dump_spec, dump_yaml, load_spec
from multitask.spec.schema import JobSpec

FILES = sorted((Path(__file__).parents[3] / "jobs" / "specs").glob("*.yaml"))
SPECS = [path for path in FILES if not path.stem.startswith("sweep_")]
"""Job specs that are shipped. The specs of sweeps are tested in tests/multitask/sweep/test_plan.py."""

TASK = {"name": "pets", "data": "somewhere", "method": "scale_bias", "resolution": 16}
SPEC = {
    "name": "job",
    "backbone": {"name": "mobilenet_v2"},
    "tasks": [TASK],
    "train_shared": True,
    "steps": 3,
    "evaluate_every": 1,
    "optimizer": {"name": "adamw", "rate": 0.001},
}


def error_of(**changes: object) -> str:
    with pytest.raises(SpecError) as caught:
        load_spec({**SPEC, **changes})
    return str(caught.value)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_shipped_specs_are_valid_and_survive_a_round_trip(path: Path) -> None:
    spec = load_spec(path)

    assert load_spec(yaml.safe_load(dump_yaml(spec))) == spec
    assert load_spec(dump_spec(spec)) == spec


def test_an_unknown_key_names_file_key_and_near_names(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**SPEC, "engine": {"name": "async", "in_fligt": 1}}))

    with pytest.raises(SpecError) as caught:
        load_spec(path)

    allowed = "name, in_flight, shards, divide_rate_by_staleness"
    assert str(caught.value) == f"{path}: engine.in_fligt: unknown key; did you mean in_flight? allowed here: {allowed}"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"steps": 0}, ["job spec: steps:", "greater than or equal to 1", "found 0"]),
        ({"steps": "many"}, ["steps", "valid integer", "found 'many'"]),
        ({"optimizer": {"name": "lion", "rate": 1}}, ["optimizer", "'rmsprop', 'sgd', 'adam', 'adamw'"]),
        ({"optimizer": {"name": "adam"}}, ["optimizer.rate", "required"]),
        ({"schedule": {"name": "cosine", "warm_up_rounds": 3}}, ["schedule.warm_up_rounds is 3", "3 steps"]),
        ({"clip_norm": 0}, ["clip_norm", "greater than 0"]),
        ({"workers": 4, "tasks": [{**TASK, "workers": 2}]}, ["workers is 4", "['pets'] have workers of their own"]),
        ({"workers": 1, "tasks": [TASK, {**TASK, "name": "cars"}]}, ["workers is 1", "2 tasks", "at least 2"]),
        ({"rate_rule": "linear"}, ["rate_rule", "'fixed' or 'per_256_images'"]),
        ({"tasks": [{**TASK, "accumulate": 0}]}, ["tasks[0].accumulate", "greater than or equal to 1"]),
        ({"tasks": [{**TASK, "precision": "float16"}]}, ["tasks[0].precision", "'float32' or 'bfloat16'"]),
        (
            {"tasks": [TASK, {**TASK, "name": "cars", "accumulate": 2}], "rate_rule": "per_256_images"},
            ["rate_rule", "64 for pets, 128 for cars", "rate_rule: fixed"],
        ),
        ({"optimizer": {"name": "sgd", "rate": -1.0}}, ["optimizer.rate", "greater than 0"]),
        ({"optimizer": {"name": "sgd", "rate": float("nan")}}, ["optimizer.rate", "finite"]),
        ({"tasks": [{**TASK, "train_on": "both"}]}, ["tasks[0].train_on", "'train' or 'train+validation'"]),
        ({"tasks": []}, ["tasks", "at least 1"]),
        ({"tasks": [TASK, TASK]}, ["'pets'", "more than once"]),
        ({"tasks": [{**TASK, "name": "a b"}]}, ["tasks[0].name", "pattern"]),
        ({"tasks": [{**TASK, "metod": "full"}]}, ["tasks[0].metod", "did you mean method?"]),
        ({"tasks": [{key: TASK[key] for key in ("name", "data", "method")}]}, ["tasks[0].resolution", "required"]),
        ({"engine": {"name": "async", "in_flight": 2}}, ["engine.in_flight", "less than or equal to 1"]),
        ({"resources": {"placement": "near"}}, ["resources.placement", "'spread' or 'pack'", "found 'near'"]),
        ({"resources": {"gpus_per_worker": 1.5}}, ["resources", "gpus_per_worker is 1.5", "at most 1"]),
        ({"tasks": [{**TASK, "resources": {"GPU": 1}}]}, ["tasks[0]", "['GPU']", "resources.gpus_per_worker"]),
        ({"tasks": [{**TASK, "resources": {"disk": 0}}]}, ["tasks[0].resources.disk", "0.0001", "found 0"]),
        ({"tasks": [{**TASK, "labels": {"zone": "!west"}}]}, ["tasks[0].labels.zone", "pattern", "found '!west'"]),
        (
            {"tasks": [TASK, {**TASK, "name": "cars", "labels": {"zone": "west"}}], "engine": {"name": "allreduce"}},
            ["'allreduce'", "resources or labels differ", "'sync'"],
        ),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(changes: dict[str, object], parts: list[str]) -> None:
    message = error_of(**changes)

    assert all(part in message for part in parts), message


def test_all_problems_are_told_at_once() -> None:
    assert len(error_of(steps=0, evaluate_every=0).splitlines()) == 2


def test_a_task_starts_with_at_most_all_its_workers() -> None:
    assert "min_workers is 3, but the task has workers: 2" in error_of(tasks=[{**TASK, "workers": 2, "min_workers": 3}])


def test_a_run_that_is_to_grow_is_refused_under_allreduce() -> None:
    tasks = [{**TASK, "workers": 2, "min_workers": 1}]
    assert "engine 'allreduce' starts all workers at once" in error_of(tasks=tasks, engine={"name": "allreduce"})
    assert load_spec(SPEC, {"tasks": tasks, "engine": {"name": "sync"}}).tasks[0].needed_workers == 1


@pytest.mark.parametrize("text", ["just words", "- a list", "a: [1", "!!python/object/apply:os.system ['true']"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)

    with pytest.raises(SpecError, match=str(path)):
        load_spec(path)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(SpecError, match=r"nowhere\.yaml"):
        load_spec("nowhere.yaml")


def test_a_variant_names_its_base_and_what_differs(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump({**SPEC, "task_defaults": {"batch_size": 8, "augment": "crop_flip"}})
    )
    (tmp_path / "variant.yaml").write_text(
        "base: base.yaml\nname: other\ntask_defaults: {batch_size: 4}\noptimizer: {name: sgd, rate: 0.5}\n"
    )

    variant = load_spec(tmp_path / "variant.yaml")

    assert (variant.name, variant.steps) == ("other", 3)
    assert (variant.tasks[0].batch_size, variant.tasks[0].augment) == (4, "crop_flip")
    # Another optimiser: none of the first one's options stay.
    assert variant.optimizer.name == "sgd"
    assert variant.optimizer.rate == 0.5


def test_a_dotted_data_path_starts_at_the_files_folder(tmp_path: Path) -> None:
    folder = tmp_path / "specs"
    folder.mkdir()
    tasks = [{**TASK, "data": "../data/a"}, {**TASK, "name": "other", "data": "s3://bucket/b"}]
    (folder / "job.yaml").write_text(yaml.safe_dump({**SPEC, "tasks": tasks}))

    spec = load_spec(folder / "job.yaml")

    assert [task.data for task in spec.tasks] == [str(tmp_path / "data" / "a"), "s3://bucket/b"]


def test_overrides_reach_nested_keys() -> None:
    spec = load_spec(SPEC, {"optimizer": {"rate": 0.25}})

    assert isinstance(spec, JobSpec)
    assert (spec.optimizer.name, spec.optimizer.rate) == ("adamw", 0.25)
    assert load_spec(spec, {"steps": 7}).steps == 7


@pytest.mark.parametrize(
    ("engine", "keys", "together", "bound"),
    [
        ("async", {"in_flight", "shards", "divide_rate_by_staleness"}, False, None),
        ("bounded", {"staleness", "in_flight", "shards", "divide_rate_by_staleness"}, False, 2),
        ("sync", {"shards"}, True, None),
        ("allreduce", {"bucket_mb"}, True, None),
        ("local", {"schedule", "delay"}, False, None),
    ],
)
def test_the_facts_of_an_engine_are_no_keys(engine: str, keys: set[str], together: bool, bound: int | None) -> None:
    facts = {"together", "bound", "shards", "in_flight", "divide_rate_by_staleness", "uses_ray", "worker_group"}
    section = {"name": engine, "staleness": 2} if engine == "bounded" else {"name": engine}

    spec = load_spec({**SPEC, "engine": section})

    assert (spec.engine.together, spec.engine.bound) == (together, bound)
    assert (spec.engine.uses_ray, spec.engine.worker_group) == (engine != "local", engine == "allreduce")
    assert (spec.engine.shards, spec.engine.in_flight, spec.engine.divide_rate_by_staleness) == (1, 0, False)
    assert dump_spec(spec)["engine"].keys() == keys | {"name"}
    for fact in facts - keys:
        assert f"engine.{fact}: unknown key" in error_of(engine={**section, fact: getattr(spec.engine, fact)})


@pytest.mark.parametrize(
    "engine",
    [{"name": "bounded", "staleness": 0}, {"name": "local", "schedule": "rounds"}],
    ids=lambda one: one["name"],
)
def test_a_bound_of_zero_and_local_rounds_apply_pushes_together(engine: dict[str, object]) -> None:
    spec = load_spec({**SPEC, "engine": engine})

    assert spec.engine.together
    assert spec.engine.bound is None
