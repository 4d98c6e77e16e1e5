from pathlib import Path

import pytest

from multitask.spec.errors import SpecError
from multitask.spec.optimizers import ExponentialSpec, RMSpropSpec
from multitask.spec.reading import dump_spec, load_spec
from multitask.spec.recipes import RECIPES
from multitask.spec.schema import JobSpec
from patches.methods import METHODS
from tests.multitask.spec.test_spec import SPEC, TASK

SPECS = Path(__file__).parents[3] / "jobs" / "specs"
PAPERS = RMSpropSpec(name="rmsprop", rate=0.045, decay=0.9, momentum=0.9, eps=1.0, weight_decay=4e-5)
ROUNDS = {"every_rounds": 521}


def load(methods: list[str] | None = None, **changes: object) -> JobSpec:
    """Load SPEC without its optimizer, with changes."""
    tasks = [
        {**TASK, "name": f"task{number}", "method": method} for number, method in enumerate(methods or ["depthwise"])
    ]
    return load_spec({key: value for key, value in SPEC.items() if key != "optimizer"} | {"tasks": tasks} | changes)


def error_of(methods: list[str] | None = None, **changes: object) -> str:
    with pytest.raises(SpecError) as caught:
        load(methods, **changes)
    return str(caught.value)


def test_every_method_has_a_recipe() -> None:
    assert set(RECIPES) == set(METHODS)


@pytest.mark.parametrize("methods", [["scale_bias"], ["depthwise", "norm_statistics"], ["scale_bias+last_layer"]])
def test_without_an_optimizer_the_papers_is_used(methods: list[str]) -> None:
    spec = load(methods, schedule=ROUNDS)

    assert spec.optimizer == PAPERS
    assert spec.schedule == ExponentialSpec(name="exponential", factor=0.98, every_rounds=521)
    # What the run directory holds needs no recipe.
    assert dump_spec(spec)["optimizer"]["rate"] == 0.045
    assert load_spec(dump_spec(spec)) == spec


def test_the_shipped_transfer_spec_is_the_recipe() -> None:
    spec = load_spec(SPECS / "transfer.yaml")
    raw = dump_spec(spec)
    del raw["optimizer"]
    raw["schedule"] = {"every_rounds": spec.schedule.every_rounds}

    assert load_spec(raw) == spec


def test_what_the_paper_sets_for_each_data_set_is_required() -> None:
    rounds, rate = error_of(), error_of(["full"], schedule=ROUNDS)

    assert rounds.startswith("job spec: schedule.every_rounds: ")
    assert all(
        part in rounds for part in ("'depthwise'", "2.5 epochs", "K for the Price of 1", "schedule: {every_rounds")
    )
    assert rate.startswith("job spec: optimizer.rate: ")
    assert all(part in rate for part in ("'full'", "0.0045 to 0.45", "K for the Price of 1", "optimizer: {rate: ...}"))
    assert load(["full"], schedule=ROUNDS, optimizer={"rate": 0.0045}).optimizer.weight_decay == 4e-5


@pytest.mark.parametrize("optimizer", [{"weight_decay": 0.0}, {"name": "rmsprop", "weight_decay": 0.0}])
def test_an_optimizer_without_name_or_rate_is_filled_in(optimizer: dict[str, object]) -> None:
    spec = load(optimizer=optimizer, schedule={"name": "cosine"})

    assert (spec.optimizer.name, spec.optimizer.rate, spec.optimizer.weight_decay) == ("rmsprop", 0.045, 0.0)
    assert spec.schedule.name == "cosine"


def test_another_optimizer_takes_nothing_from_the_recipe() -> None:
    assert load(optimizer={"name": "rmsprop", "rate": 0.1}).optimizer.weight_decay == 0.0
    assert load(optimizer={"name": "sgd", "rate": 0.1}).schedule.name == "constant"
    assert error_of(optimizer={"name": "sgd"}) == "job spec: optimizer.rate: this key is required"


def test_methods_without_a_common_recipe_ask_for_an_optimizer() -> None:
    different = error_of(["scale_bias", "full"])
    unknown = error_of(["scale_bias+wings"])

    assert different.startswith("job spec: optimizer: methods 'scale_bias' and 'full' have different recipes. Set")
    assert unknown.startswith(
        "job spec: optimizer: method 'wings' has no recipe; the methods with one are scale_bias, "
    )
    assert load(["scale_bias", "full"], optimizer={"name": "sgd", "rate": 0.1}).optimizer.name == "sgd"


@pytest.mark.parametrize("tasks", ["pets", [], [3], [{"name": "pets"}]])
def test_tasks_without_a_readable_method_are_left_to_the_validation(tasks: object) -> None:
    assert "tasks" in error_of(tasks=tasks)


@pytest.mark.parametrize(
    ("method", "name", "given"),
    [
        ("dtl", "adamw", {"rate": 1e-3}),
        ("dtl_plus_star", "adamw", {"rate": 1e-3}),
        ("mist", "adam", {"rate": 1e-3}),
        ("parasite", "adamw", {"rate": 5e-4, "weight_decay": 1e-4}),
    ],
)
def test_the_side_networks_recipes_leave_rate_and_warm_up_to_the_spec(method: str, name: str, given: dict) -> None:
    spec = load([method], optimizer=given, schedule={"warm_up_rounds": 2})

    assert (spec.optimizer.name, spec.optimizer.rate) == (name, given["rate"])
    assert spec.optimizer.weight_decay == {"adamw": given.get("weight_decay", 0.05), "adam": 0.0}[name]
    assert (spec.schedule.name, spec.schedule.warm_up_rounds) == ("cosine", 2)
    assert error_of([method]).startswith("job spec: optimizer.rate: ")
    without_warm_up = error_of([method], optimizer=given)
    assert without_warm_up.startswith("job spec: schedule.warm_up_rounds: ")
    assert "10 of 100 epochs" in without_warm_up
    if len(given) > 1:
        assert error_of([method], optimizer={"rate": 1.0}).startswith("job spec: optimizer.weight_decay: ")
