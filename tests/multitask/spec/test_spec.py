from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from multitask.spec.errors import SpecError
from multitask.spec.reading import dump_spec, dump_yaml, load_spec
from multitask.spec.schema import JobSpec
from multitask.spec.text import to_yaml

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
        ({"steps": None}, ["expected either steps or epochs, found neither"]),
        ({"epochs": 2.5}, ["expected either steps or epochs, found steps: 3 and epochs: 2.5"]),
        ({"evaluate_every": None}, ["evaluate_every is required with steps"]),
        ({"steps": None, "epochs": 0}, ["epochs", "greater than 0"]),
        ({"patience": 3}, ["patience: unknown key; did you mean stop_after?"]),
        (
            {"stop_after": 2, "tasks": [{**TASK, "train_on": "train+validation"}]},
            ["stop_after is 2", "['pets'] train on their validation images"],
        ),
        ({"tasks": [{**TASK, "ema": 1.0}]}, ["tasks[0].ema", "less than 1", "found 1.0"]),
        ({"wandb": {"project": "x"}}, ["wandb: wandb is not supported", "MLflow", "tracking.uri"]),
        ({"tracking": {"tensorboard": True}}, ["tracking.tensorboard: TensorBoard is not supported", "tracking.uri"]),
        ({"tracking": {"backend": "wandb"}}, ["tracking.backend: wandb is not supported"]),
        ({"tracking": "wandb"}, ["job spec: tracking: wandb is not supported"]),
        ({"tasks": [{**TASK, "loss": "bce"}]}, ["tasks[0].loss: binary cross-entropy (multi-label) is not supported"]),
        ({"loss": "focal"}, ["loss: another loss is not supported", "label_smoothing"]),
        ({"tasks": [{**TASK, "multi-label": True}]}, ["multi-label is not supported", "a task of each label"]),
        ({"tasks": [{**TASK, "type": "regression"}]}, ["tasks[0].type: regression is not supported", "ranges"]),
        ({"max_epochs": 3}, ["max_epochs: unknown key; did you mean epochs?"]),
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
        ({"steps": True}, ["steps: expected a number, found True"]),
        ({"optimizer": {"name": "sgd", "rate": False}}, ["optimizer.rate: expected a number, found False"]),
        ({"name": 2026}, ["name:", "in quotes", "found 2026"]),
        ({"name": "x" * 101}, ["name: String should have at most 100 characters"]),
        ({"engine": "local"}, ["engine: expected keys and values, for example engine: {name: local}"]),
        ({"schedule": "cosine"}, ["schedule: {name: cosine}"]),
        ({"resources": "many"}, ["resources: expected keys and values, found 'many'"]),
        ({"tasks": {"pets": TASK}}, ["tasks: expected a list"]),
        ({"task_defaults": 3.5}, ["task_defaults: expected keys and values, found 3.5"]),
        ({"optimizer": False}, ["optimizer: expected keys and values, found False"]),
        (
            {"engine": {"type": "local"}},
            ["engine.type: unknown key; did you mean name?", "engine: its name is required"],
        ),
        ({"schedule": {"name": "cosine", "warmup_rounds": 1}}, ["schedule.warmup_rounds", "mean warm_up_rounds?"]),
        ({"optimizer": {"name": "adam", "lr": 0.1}}, ["optimizer.lr: unknown key; did you mean rate?"]),
        ({"tasks": [{**TASK, "mean": [123.7, 116.3, 103.5]}]}, ["tasks[0].mean[0]", "0 to 255 by 255", "found 123.7"]),
        ({"tasks": [{**TASK, "mean": [-0.1, 0, 0]}]}, ["tasks[0].mean[0]", "0 to 1", "found -0.1"]),
        ({"tasks": [{**TASK, "mean": [float("nan"), 0, 0]}]}, ["tasks[0].mean[0]", "finite"]),
        ({"tasks": [{**TASK, "std": [58.4, 57.1, 57.4]}]}, ["tasks[0].std[0]", "0 to 255 by 255", "found 58.4"]),
        ({"tasks": [{**TASK, "std": [0, 1, 1]}]}, ["tasks[0].std[0]", "greater than 0, found 0"]),
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


def test_a_wrong_task_brings_no_second_problem_that_is_none() -> None:
    """Without the task, there would be too few tasks, and no recipe that has an optimizer."""
    task = {key: value for key, value in TASK.items() if key != "method"}
    assert error_of(tasks=[task], optimizer=None) == "job spec: tasks[0].method: this key is required"


def test_an_unknown_key_comes_before_the_missing_one_that_it_stands_for() -> None:
    lines = error_of(optimizer={"name": "sgd", "lr": 0.1}).splitlines()
    assert [line.partition(":")[2].partition(":")[0].strip() for line in lines] == ["optimizer.lr", "optimizer.rate"]


@pytest.mark.parametrize(
    "changes",
    [
        {"x" * 5000: 1},
        {"name": "x" * 5000},
        {"optimizer": {"name": "x" * 5000}},
        {"rate_rule": "x" * 5000},
        {"tasks": [{**TASK, "x" * 5000: 1}]},
        {"tasks": [{**TASK, "method": "x" * 5000}], "optimizer": None},
        {"tasks": [{**TASK, "resolution": ["x" * 5000, "x" * 5000]}]},
        {"tasks": [{**TASK, "name": f"task{number % 300}"} for number in range(600)]},
        {"tasks": [{**TASK, "batch_size": -number} for number in range(600)]},
        {f"key{number}": 1 for number in range(600)},
        {"directory": "~" + "x" * 5000},
    ],
    ids=lambda changes: next(iter(changes))[:9],
)
def test_a_message_is_short_and_quotes_little(changes: dict[str, object]) -> None:
    message = error_of(**changes)

    assert len(message) < 1000
    assert "x" * 200 not in message


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"directory": "~/runs/a"}, lambda spec: spec.directory),
        ({"tasks": [{**TASK, "data": "~/runs/a"}]}, lambda spec: spec.tasks[0].data),
        (
            {"tasks": [{**TASK, "cache_features": "~/runs/a"}], "train_shared": False},
            lambda s: s.tasks[0].cache_features,
        ),
        ({"backbone": {"name": "resnet18", "weights": "~/runs/a"}}, lambda spec: spec.backbone.weights),
        ({"checkpoints": {"uri": "~/runs/a"}}, lambda spec: spec.checkpoints.uri),
        ({"tracking": {"uri": "~/runs/a"}}, lambda spec: spec.tracking.uri),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_a_tilde_is_the_home_directory(
    change: dict[str, object], where: Callable[[JobSpec], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert where(load_spec({**SPEC, **change})) == "/home/me/runs/a"


def test_a_tilde_in_the_names_of_specs_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text(to_yaml(SPEC))
    (tmp_path / "job.yaml").write_text("base: ~/base.yaml\nsteps: 7\n")
    assert load_spec("~/job.yaml").steps == 7


@pytest.mark.parametrize("path", ["~no-such-user/a", "sqlite:///~/mlflow.db", "file://~/a"])
def test_a_tilde_without_a_home_directory_is_refused(path: str) -> None:
    assert "tracking.uri: " in error_of(tracking={"uri": path})


@pytest.mark.parametrize(("base", "part"), [("job.yaml", "leads back to itself"), ("[a]", "the name of a YAML file")])
def test_a_base_is_another_file(tmp_path: Path, base: str, part: str) -> None:
    (tmp_path / "job.yaml").write_text(f"base: {base}\n")
    with pytest.raises(SpecError, match=part):
        load_spec(tmp_path / "job.yaml")


def test_a_number_in_an_option_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(f"{to_yaml(SPEC)}backbone: {{name: resnet18, options: {{norm_momentum: 1e-1}}}}")
    with pytest.raises(SpecError, match="'backbone' stands twice"):
        load_spec(tmp_path / "job.yaml")
    (tmp_path / "variant.yaml").write_text("base: base.yaml\nbackbone: {options: {norm_momentum: 1e-1}}\n")
    (tmp_path / "base.yaml").write_text(to_yaml(SPEC))

    spec = load_spec(tmp_path / "variant.yaml")

    assert spec.backbone.options == {"norm_momentum": 0.1}
    (tmp_path / "again.yaml").write_text(dump_yaml(spec))
    assert load_spec(tmp_path / "again.yaml") == spec


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
