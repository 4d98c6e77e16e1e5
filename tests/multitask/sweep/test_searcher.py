"""Results that Optuna gets, and settings that it suggests, without Ray."""

import json
import math
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from multitask.errors import RunError
from multitask.spec.errors import SpecError
from multitask.sweep import searcher
from multitask.sweep.outcomes import TrialOutcome
from multitask.sweep.plan import TrialPlan
from multitask.sweep.searcher import SETTINGS, Suggestions
from multitask.sweep.spec import SweepSpec, load_sweep
from tests.multitask.sweep.conftest import MakeOutcome

METHODS = ["full", {"any": "mapping"}]
Drive = Callable[..., list[dict[str, Any]]]


def best_at_a_hundredth(values: Mapping[str, Any]) -> float:
    return 90 - 10 * abs(math.log10(values["rate"]) + 2) - 5 * (values["method"] == "full")


@pytest.fixture
def spec(tmp_path: Path) -> SweepSpec:
    (tmp_path / "sweep").mkdir()
    return load_sweep(
        {
            "name": "sweep",
            "job": {},
            "space": {"rate": {"log_uniform": [1e-5, 1.0]}, "method": {"grid": METHODS}},
            "searcher": {"name": "optuna", "startup_trials": 5},
            "samples": 15,
            "directory": str(tmp_path / "sweep"),
        }
    )


@pytest.fixture
def drive(spec: SweepSpec, make_outcome: MakeOutcome, monkeypatch: pytest.MonkeyPatch) -> Drive:
    """Run up to a number of invented trials, one at a time, as Tune would, and return their settings."""

    def plan(number: int, values: Mapping[str, Any]) -> TrialPlan:
        return replace(make_outcome(number, 0.0).plan, values=dict(values))

    def run(
        trials: int,
        score: Callable[[Mapping[str, Any]], float] = best_at_a_hundredth,
        *,
        seed: int = 0,
        last: float = 0.0,
        bonus: Mapping[int, float] = MappingProxyType({}),
        failed: Set[int] = frozenset(),
        anew: bool = True,
    ) -> list[dict[str, Any]]:
        def read(plan: TrialPlan) -> TrialOutcome:
            best = score(plan.values) + bonus.get(plan.number, 0.0)
            return TrialOutcome(plan=plan, state="finished", curve=((2, best), (4, last)))

        monkeypatch.setattr(searcher, "read_outcome", read)
        if anew:
            (spec.run_directory / SETTINGS).unlink(missing_ok=True)
        search = Suggestions(replace(spec, seed=seed), plan)
        found = []
        for number in range(trials):
            found.append(search.suggest(str(number))["plan"])
            search.on_trial_complete(str(number), None, error=number in failed)
        assert [plan.number for plan in found] == list(range(trials))
        assert found == search.plans[:trials]
        return [dict(plan.values) for plan in found]

    return run


def test_what_trials_found_leads_to_better_ones(drive: Drive) -> None:
    found = drive(15)

    scores = [best_at_a_hundredth(values) for values in found]
    assert sum(scores[-5:]) > sum(scores[:5])
    elsewhere = drive(15, lambda values: -best_at_a_hundredth(values))
    # The first settings are suggested without any results.
    assert elsewhere[:5] == found[:5]
    assert all(values != other for values, other in zip(found[5:], elsewhere[5:], strict=True))


def test_equal_seeds_suggest_alike(drive: Drive) -> None:
    assert drive(8) == drive(8)
    assert drive(8) != drive(8, seed=1)


def test_values_of_every_kind_are_drawn_within_the_space(drive: Drive) -> None:
    found = drive(15)

    assert all(1e-5 <= values["rate"] <= 1.0 for values in found)
    assert len({values["rate"] for values in found}) == 15
    assert all(method in [values["method"] for values in found] for method in METHODS)


def test_the_best_evaluation_counts_as_in_the_choice(drive: Drive) -> None:
    assert drive(10, last=0.0) == drive(10, last=40.0)


def test_a_sweep_that_goes_on_suggests_what_it_would_have_without_the_stop(drive: Drive) -> None:
    straight = drive(15)

    for trials in (3, 9, 15):
        stopped = drive(trials, anew=trials == 3)

    assert stopped == straight


def test_a_trial_that_had_not_ended_keeps_its_setting(spec: SweepSpec, drive: Drive) -> None:
    straight = drive(9)
    drive(6)
    (spec.run_directory / SETTINGS).write_text(json.dumps(straight[:7]))

    assert drive(9, anew=False) == straight


def test_a_failed_trial_is_not_judged(drive: Drive) -> None:
    found = drive(10, bonus={6: 50.0})
    assert found != drive(10)

    assert drive(10, bonus={6: 50.0}, failed={6}) == drive(10, failed={6})


def test_a_setting_that_makes_no_job_is_not_written_down(spec: SweepSpec) -> None:
    def refuse(*_: Any) -> TrialPlan:
        raise SpecError("no such job")

    with pytest.raises(SpecError, match="no such job"):
        Suggestions(spec, refuse).suggest("a")

    assert not (spec.run_directory / SETTINGS).exists()


def test_settings_of_version_0_1_have_the_numbers_that_it_kept_as_text(spec: SweepSpec) -> None:
    """YAML read `1e-3` as text then; it is a number now."""
    choices = [{"name": "sgd", "rate": 0.01}, 0.001, "1e-2"]
    dimensions = {"rate": spec.dimensions["rate"], "method": replace(spec.dimensions["method"], grid=choices)}
    spec = replace(spec, space=dimensions)
    earlier = [{"name": "sgd", "rate": "1e-2"}, "1e-3", "1e-2"]
    path = spec.run_directory / SETTINGS
    path.write_text(json.dumps([{"rate": 0.1, "method": method} for method in earlier]))

    found = Suggestions(spec, lambda number, values: TrialPlan(number, number, dict(values), None)).plans  # type: ignore[arg-type]

    assert [plan.values["method"] for plan in found] == choices


@pytest.mark.parametrize("values", [{"rate": 0.1}, {"rate": 0.1, "method": "fll"}, {"rate": 7.0, "method": "full"}])
def test_a_setting_that_the_space_does_not_have_is_named(spec: SweepSpec, values: dict[str, Any]) -> None:
    path = spec.run_directory / SETTINGS
    path.write_text(json.dumps([{"rate": 0.1, "method": "full"}, values]))
    with pytest.raises(RunError, match=r"settings\.json' is damaged: setting 2 does not fit the space: .* Restore it"):
        Suggestions(spec, lambda *_: pytest.fail("no trial is planned"))
