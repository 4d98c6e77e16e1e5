"""`ema` through whole jobs: what is trained, evaluated, kept and resumed."""

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest

from multitask.job.job import Job
from multitask.job.room import checkpoint_bytes
from multitask.server.messages import AVERAGE
from multitask.spec.errors import SpecError
from multitask.spec.schema import JobSpec
from tests.conftest import EngineRun, run_engine, store_of

MakeSpec = Callable[..., JobSpec]
ROUNDS = {"name": "local", "schedule": "rounds"}
PRIVATE = "private:pets"


def spec_of(make_spec: MakeSpec, workers: int, ema: float | None, **changes: Any) -> JobSpec:
    tasks = {"pets": {"workers": workers, "ema": ema}, "cars": {}}
    return make_spec(tasks, **{"engine": ROUNDS, "steps": 6, "evaluate_every": 1, **changes})


def values_of(ran: EngineRun, group: str) -> list[np.ndarray]:
    return [evaluation.groups[group].values for evaluation in ran.evaluations]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_evaluated_is_the_average_and_what_is_trained_is_not(make_spec: MakeSpec, workers: int) -> None:
    """With one worker the private tensors are the worker's, with two they lie on the server."""
    raw, averaged = (run_engine(Job(spec_of(make_spec, workers, ema))) for ema in (None, 0.8))

    assert [record.loss for record in averaged.records] == [record.loss for record in raw.records]
    for group in ("private:cars", "shared:pets+cars"):
        assert all(
            np.array_equal(*pair) for pair in zip(values_of(averaged, group), values_of(raw, group), strict=True)
        )
    layout, start = raw.job.groups[PRIVATE].layout, raw.job.groups[PRIVATE].values
    expected = start[: layout.trained].double().numpy()
    for found, trained in zip(values_of(averaged, PRIVATE), values_of(raw, PRIVATE), strict=True):
        expected = 0.8 * expected + 0.2 * trained[: layout.trained].astype(np.float64)
        np.testing.assert_allclose(found[: layout.trained], expected, rtol=1e-5, atol=1e-6)
        assert np.array_equal(found[layout.trained :], trained[layout.trained :])
    losses = [[evaluation.metrics["pets"]["loss"] for evaluation in ran.evaluations] for ran in (raw, averaged)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_with_averages_goes_on_bit_for_bit(make_spec: MakeSpec, workers: int) -> None:
    whole = run_engine(Job(spec_of(make_spec, workers, 0.8)))
    job, asked = Job(spec_of(make_spec, workers, 0.8)), count()
    first = run_engine(job, wants_pause=lambda: next(asked) >= 2)
    assert first.outcome.paused
    checkpoint = store_of(job).latest()
    assert checkpoint is not None
    name = "tasks/pets/classifier.1.weight"
    assert not checkpoint.tensors[f"slots/{AVERAGE}/{name}"].equal(checkpoint.tensors[f"values/{name}"])

    second = run_engine(Job(job.spec, checkpoint))

    found = values_of(first, PRIVATE) + values_of(second, PRIVATE)
    assert all(np.array_equal(*pair) for pair in zip(found, values_of(whole, PRIVATE), strict=True))
    # Only `pets` has an average, and its checkpoints are larger by that.
    assert not [name for name in checkpoint.tensors if name.startswith(f"slots/{AVERAGE}/") and "pets" not in name]
    more = checkpoint_bytes(job) - checkpoint_bytes(Job(spec_of(make_spec, workers, None)))
    assert more == 4 * job.groups[PRIVATE].layout.trained


@pytest.mark.parametrize("method", ["shared", "norm_statistics"])
def test_an_average_of_nothing_is_refused(make_spec: MakeSpec, method: str) -> None:
    task = {"method": method, "num_classes": None, "ema": 0.99}
    with pytest.raises(SpecError, match=f"ema averages the task's own parameters, but method '{method}' owns none"):
        Job(make_spec({"pets": task}))
