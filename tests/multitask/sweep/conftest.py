"""Fixtures of the tests of sweeps: invented outcomes of trials."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from multitask.spec.schema import JobSpec
from multitask.sweep.outcomes import TrialOutcome
from multitask.sweep.plan import TrialPlan

MakeOutcome = Callable[..., TrialOutcome]


@pytest.fixture
def make_outcome(make_spec: Callable[..., JobSpec], tmp_path: Path) -> MakeOutcome:
    def make(
        number: int, top1: float, *, setting: int | None = None, method: str = "full", rate: float = 0.1, **changes: Any
    ) -> TrialOutcome:
        spec = make_spec(
            tasks={"pets": {"method": method}},
            name=f"s_{number:04d}",
            optimizer={"rate": rate},
            directory=str(tmp_path / "trials" / f"{number:04d}"),
        )
        values = {"tasks.method": method, "optimizer.rate": rate}
        plan = TrialPlan(number, number if setting is None else setting, values, spec)
        curve = ((2, top1 - 5), (4, top1))
        known: dict[str, Any] = {"state": "finished", "curve": curve, "trained_parameters": 100, "seconds": 1.5}
        return TrialOutcome(plan=plan, **{**known, **changes})

    return make
