"""The sweep spec, and the trials that it makes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from multitask.run.paths import absolute
from multitask.spec.errors import SpecError
from multitask.spec.reading import dump_spec
from multitask.spec.schema import JobSpec
from multitask.spec.text import to_yaml
from multitask.sweep.plan import describe, plan_trials, set_key, settings, short_names
from multitask.sweep.spec import READY, Dimension, SweepSpec, dump_sweep, load_sweep

MakeSpec = Callable[..., JobSpec]


@pytest.fixture
def make_sweep(make_spec: MakeSpec, tmp_path: Path) -> Callable[..., SweepSpec]:
    def make(job: dict[str, Any] | None = None, **changes: Any) -> SweepSpec:
        content = {key: value for key, value in dump_spec(make_spec()).items() if key not in ("name", "directory")}
        content |= {"tracking": {}} | (job or {})
        directory = str(tmp_path / "runs" / "rates")
        return load_sweep({"name": "rates", "job": content, "directory": directory, **changes})

    return make


def test_every_value_of_a_grid_meets_every_value_of_the_others(make_sweep: Callable[..., SweepSpec]) -> None:
    spec = make_sweep(
        space={"tasks.method": {"grid": ["last_layer", "full"]}, "optimizer.rate": {"grid": [0.1, 0.2, 0.3]}}
    )

    plans = plan_trials(spec)

    found = [(tuple(task.method for task in plan.spec.tasks), plan.spec.optimizer.rate) for plan in plans]
    assert found == [((method,) * 2, rate) for method in ("last_layer", "full") for rate in (0.1, 0.2, 0.3)]
    assert [plan.number for plan in plans] == list(range(6))
    assert len({plan.directory for plan in plans}) == 6


def test_drawn_keys_are_drawn_anew_for_each_sample_and_alike_for_each_start(
    make_sweep: Callable[..., SweepSpec],
) -> None:
    space = {
        "optimizer.rate": {"log_uniform": [1e-4, 1e-1]},
        "tasks.batch_size": {"choice": [4, 8, 16]},
        "steps": {"grid": [2, 3]},
    }
    spec = make_sweep(space=space, samples=5)

    found = settings(spec)

    assert len(found) == 10
    assert len({setting["optimizer.rate"] for setting in found}) == 10
    assert {setting["tasks.batch_size"] for setting in found} <= {4, 8, 16}
    assert found == settings(spec)
    assert found != settings(make_sweep(space=space, samples=5, seed=1))


@given(low=st.floats(1e-6, 1.0), factor=st.floats(1.01, 1e6), seed=st.integers(0, 2**32))
def test_log_uniform_draws_lie_between_their_ends(low: float, factor: float, seed: int) -> None:
    spec = SweepSpec(
        name="s", job={}, space={"optimizer.rate": Dimension(log_uniform=(low, low * factor))}, samples=3, seed=seed
    )

    assert all(low <= setting["optimizer.rate"] <= low * factor for setting in settings(spec))


def test_log_uniform_is_uniform_in_the_logarithm() -> None:
    spec = SweepSpec(name="s", job={}, space={"rate": Dimension(log_uniform=(1e-4, 1.0))}, samples=2000)

    logarithms = [math.log10(setting["rate"]) for setting in settings(spec)]

    shares = [sum(low <= value < low + 1 for value in logarithms) / 2000 for low in (-4, -3, -2, -1)]
    assert all(abs(share - 0.25) < 0.05 for share in shares)


def test_the_edges_have_each_named_value_and_both_ends(make_sweep: Callable[..., SweepSpec]) -> None:
    space = {"optimizer.rate": {"log_uniform": [0.01, 0.1]}, "tasks.method": {"choice": ["full", "last_layer"]}}

    plans = plan_trials(make_sweep(space=space, searcher={"name": "optuna"}, samples=9))

    found = [(plan.spec.optimizer.rate, plan.spec.tasks[0].method) for plan in plans]
    assert found == [(0.01, "full"), (0.1, "full"), (0.01, "last_layer")]


def test_repeats_differ_in_their_seed_alone(make_sweep: Callable[..., SweepSpec]) -> None:
    plans = plan_trials(make_sweep(job={"seed": 7}, space={"optimizer.rate": {"grid": [0.1, 0.2]}}, repeats=2))

    assert [(plan.setting, plan.spec.seed) for plan in plans] == [(0, 7), (0, 8), (1, 7), (1, 8)]
    one, other = (dump_spec(plan.spec) for plan in plans[:2])
    assert {key for key in one if one[key] != other[key]} == {"name", "directory", "seed"}


def test_a_key_of_one_task_leaves_the_others_alone() -> None:
    raw = {"tasks": [{"name": "pets", "options": {"k": 1}}, {"name": "cars.v2"}]}

    set_key(raw, "tasks.cars.v2.options.k", 4)
    set_key(raw, "tasks.batch_size", 2)

    assert raw == {
        "tasks": [
            {"name": "pets", "options": {"k": 1}, "batch_size": 2},
            {"name": "cars.v2", "options": {"k": 4}, "batch_size": 2},
        ]
    }


def test_planning_leaves_the_sweeps_job_as_it_is(make_sweep: Callable[..., SweepSpec]) -> None:
    spec = make_sweep(space={"optimizer.rate": {"grid": [0.5]}})
    before = yaml.safe_dump(dump_sweep(spec))

    plan_trials(spec)

    assert yaml.safe_dump(dump_sweep(spec)) == before


def test_trials_keep_their_checkpoints_apart(make_sweep: Callable[..., SweepSpec]) -> None:
    job = {"checkpoints": {"uri": "s3://bucket/checkpoints/"}}
    plans = plan_trials(make_sweep(job=job, space={"optimizer.rate": {"grid": [0.1, 0.2]}}))

    assert [plan.spec.checkpoint_folder for plan in plans] == [f"s3://bucket/checkpoints/000{n}" for n in (0, 1)]


def test_the_papers_spaces_have_the_papers_sizes() -> None:
    def size(name: str) -> int:
        return math.prod(len(dimension.grid or ()) for dimension in READY[name].values())

    assert {name: size(name) for name in READY} == {"k_for_1_rates": 5, "parasite_grid": 14 * 4 * 6, "mist_k": 3}
    rates = READY["k_for_1_rates"]["optimizer.rate"].grid
    assert rates is not None
    assert (rates[0], rates[-1]) == (0.0045, 0.45)


def test_a_ready_space_may_be_changed(make_sweep: Callable[..., SweepSpec]) -> None:
    spec = make_sweep(ready=["k_for_1_rates"], space={"optimizer.rate": {"grid": [0.1]}, "steps": {"grid": [2, 3]}})

    assert settings(spec) == [{"optimizer.rate": 0.1, "steps": 2}, {"optimizer.rate": 0.1, "steps": 3}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "a sweep needs a key in space"),
        ({"space": {"steps": {"grid": [1], "choice": [2]}}}, "space.steps: give exactly one of"),
        ({"space": {"steps": {"grid": []}}}, "at least 1 item"),
        ({"space": {"optimizer.rate": {"grid": [0.1, 0.2, 0.1]}}}, "grid has 0.1 twice"),
        (
            {"space": {"optimizer.rate": {"grid": [0.1]}, "optimizer": {"grid": [{"name": "sgd", "rate": 0.2}]}}},
            "space has optimizer and its part optimizer.rate",
        ),
        ({"space": {"steps": {"gird": [1]}}}, "space.steps.gird: unknown key; did you mean grid"),
        ({"space": {"optimizer.rate": {"log_uniform": [0.1, 0.01]}}}, "the first number has to be below the second"),
        ({"space": {"steps": {"grid": [1]}}, "samples": 2}, "nothing is drawn"),
        ({"space": {"seed": {"grid": [1]}}, "repeats": 2}, "leave one of them out"),
        ({"space": {"steps": {"grid": [1]}}, "searcher": {"name": "optuna"}}, "the number of all trials with searcher"),
        (
            {"space": {"steps": {"grid": [1]}}, "searcher": {"name": "optuna"}, "samples": 9, "repeats": 2},
            "searcher optuna makes one trial of each setting",
        ),
        ({"space": {"steps": {"grid": [1]}}, "sheduler": {}}, "did you mean scheduler"),
        ({"space": {"steps": {"grid": [1]}}, "job": {"directory": "x"}}, "the sweep sets this key"),
        ({"space": {"steps": {"grid": [1]}}, "job": {"tasks": 3.5}}, "job.tasks: expected a list"),
        ({"space": {"steps": {"grid": [1]}}, "job": {"tracking": "x"}}, "job.tracking: expected keys and values"),
        ({"space": {"steps": {"grid": [1]}}, "job": {"seed": "x"}}, "job.seed: expected a whole number"),
        ({"space": {"steps": {"grid": [1]}}, "job": {"task_defaults": "x"}}, "task_defaults: expected keys and values"),
        ({"space": {"steps": {"grid": [1]}}, "searcher": "optuna"}, r"searcher: {name: optuna}"),
        ({"space": {"steps": {"grid": [1, 2]}}, "repeats": 5001}, "has 10002 trials, but at most 10,000"),
        ({"space": {"steps": {"choice": [1, 2]}}, "samples": 10**12}, "at most 10,000"),
    ],
)
def test_a_wrong_sweep_names_the_key(
    make_sweep: Callable[..., SweepSpec], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        make_sweep(**changes)


@pytest.mark.parametrize("searcher", [{"name": "none"}, {"name": "optuna"}])
@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"optimizer.rat": {"grid": [0.5]}}, r"setting rat=0.5: .*optimizer.rat: unknown key; did you mean rate"),
        ({"optimizer.rate": {"grid": [0.5, -1.0]}}, r"setting rate=-1: .*greater than 0"),
        ({"steps.many": {"grid": [1]}}, "space.steps.many: 'steps' of the job is 4"),
    ],
)
def test_a_setting_that_fits_no_job_is_named(
    make_sweep: Callable[..., SweepSpec], searcher: dict[str, Any], space: dict[str, Any], message: str
) -> None:
    samples = {"samples": 9} if searcher["name"] == "optuna" else {}
    with pytest.raises(SpecError, match=message):
        plan_trials(make_sweep(space=space, searcher=searcher, **samples))


@pytest.mark.parametrize(
    "space",
    [
        {"directory": {"grid": ["a", "b"]}},
        {"tracking.experiment": {"grid": ["a", "b"]}},
        {"task_defaults.method": {"grid": ["full", "last_layer"]}},  # each task has a method of its own
        {"tasks.pets.batch_size": {"grid": [2, 4]}, "tasks.batch_size": {"grid": [8]}},
    ],
)
def test_a_key_without_effect_is_refused(make_sweep: Callable[..., SweepSpec], space: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="are one and the same job"):
        plan_trials(make_sweep(space=space))
    with pytest.raises(SpecError, match="are one and the same job"):
        plan_trials(make_sweep(space=space, searcher={"name": "optuna"}, samples=9))


def test_values_of_a_space_may_be_what_is_no_spec(make_sweep: Callable[..., SweepSpec]) -> None:
    for key, value in {"tracking": "x", "checkpoints": 3, "tasks": [1], "backbone": None}.items():
        with pytest.raises(SpecError, match=f"setting {key}="):
            plan_trials(make_sweep(space={key: {"grid": [value]}}))


def test_rates_in_a_file_are_numbers_with_and_without_a_point(make_spec: MakeSpec, tmp_path: Path) -> None:
    job = {key: value for key, value in dump_spec(make_spec()).items() if key not in ("name", "directory")}
    text = to_yaml({"name": "rates", "job": job})
    for rates in ("1e-3, 1e-2", "0.001, 0.01"):
        (tmp_path / "sweep.yaml").write_text(f"{text}space: {{optimizer.rate: {{grid: [{rates}]}}}}\n")
        assert settings(load_sweep(tmp_path / "sweep.yaml")) == [{"optimizer.rate": rate} for rate in (0.001, 0.01)]


def test_a_value_that_is_drawn_twice_is_two_trials(make_sweep: Callable[..., SweepSpec]) -> None:
    plans = plan_trials(make_sweep(space={"steps": {"choice": [2]}}, samples=2))

    assert [plan.values for plan in plans] == [{"steps": 2}] * 2


def test_relative_paths_start_at_the_sweeps_file(make_spec: MakeSpec, tmp_path: Path) -> None:
    job = dump_spec(make_spec(tasks={"pets": {}}))
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "base.yaml").write_text(yaml.safe_dump(job))
    content = {
        "name": "rates",
        "source": "./base.yaml",
        "job": {"base": "base.yaml", "tasks": [{**job["tasks"][0], "data": "../data/pets"}]},
        "space": {"optimizer.rate": {"grid": [0.1]}},
    }
    (tmp_path / "specs" / "sweep.yaml").write_text(yaml.safe_dump(content))

    spec = load_sweep(tmp_path / "specs" / "sweep.yaml")

    assert spec.source == str(tmp_path / "specs" / "base.yaml")
    (plan,) = plan_trials(spec, weights="backbone.safetensors")
    assert plan.spec.tasks[0].data == str(tmp_path / "data" / "pets")
    assert plan.spec.backbone.weights == "backbone.safetensors"
    assert plan.with_absolute_paths().spec == absolute(plan.spec), "its run finds what the trials share by these names"
    assert plan.spec.name == "rates_0000"


def test_keys_are_short_where_that_is_clear() -> None:
    keys = ["optimizer.rate", "tasks.pets.method", "tasks.cars.method"]

    assert short_names(keys) == {keys[0]: "rate", keys[1]: keys[1], keys[2]: keys[2]}
    assert describe({"optimizer.rate": 0.123456, "tasks.method": "full"}) == "rate=0.1235, method=full"


def test_the_shipped_sweep() -> None:
    spec = load_sweep(Path(__file__).parents[3] / "jobs" / "specs" / "sweep_lr.yaml")

    plans = plan_trials(spec)

    assert len(plans) == 20
    assert len({plan.spec.tasks[0].method for plan in plans}) == 5
    assert spec.source is not None
    assert all(not plan.spec.train_shared for plan in plans)
