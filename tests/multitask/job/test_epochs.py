"""Epochs become steps: the formula against counting, and what a job records."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multitask.data.order import EpochOrder
from multitask.job.epochs import with_steps
from multitask.job.job import Job
from multitask.spec.errors import SpecError
from multitask.spec.reading import load_spec
from multitask.spec.schema import JobSpec

MakeSpec = Callable[..., JobSpec]
TASK = {"method": "scale_bias", "resolution": 16, "data": "somewhere"}


def spec_of(*tasks: dict[str, int], **changes: object) -> JobSpec:
    named = [{**TASK, "name": f"t{number}", **task} for number, task in enumerate(tasks)]
    content = {
        "name": "job",
        "backbone": {"name": "mobilenet_v2"},
        "tasks": named,
        "train_shared": True,
        "optimizer": {"name": "adamw", "rate": 0.001},
    }
    return load_spec({**content, **changes})


sizes = st.fixed_dictionaries(
    {"batch_size": st.integers(1, 9), "accumulate": st.integers(1, 3), "workers": st.integers(1, 4)}
)


@settings(max_examples=40)
@given(st.lists(st.tuples(sizes, st.integers(4, 200)), min_size=1, max_size=3), st.integers(1, 5))
def test_every_worker_goes_through_its_rows_that_often_and_not_a_step_more(
    given_tasks: list[tuple[dict[str, int], int]], epochs: int
) -> None:
    rows = {f"t{number}": count for number, (_, count) in enumerate(given_tasks)}
    steps = with_steps(spec_of(*(task for task, _ in given_tasks), epochs=epochs), rows).steps

    def own_rows(count: int, rank: int, workers: int) -> int:
        return EpochOrder(np.array([count]), seed=0, rank=rank, workers=workers, window=8).rows_per_epoch

    def are_enough(steps: int) -> bool:
        return all(
            steps * task["batch_size"] * task["accumulate"] >= epochs * own_rows(count, rank, task["workers"])
            for task, count in given_tasks
            for rank in range(task["workers"])
        )

    assert steps is not None
    assert are_enough(steps)
    assert not are_enough(steps - 1)


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [(0.1, 1), (0.3, 3), (0.31, 4), (1, 10), (2.7, 27), (1e-9, 1)],
)
def test_a_part_of_an_epoch_is_what_it_is_written_as(epochs: float, steps: int) -> None:
    """As floats, 0.1, 0.3 and 2.7 are a little more or less than what is written."""
    assert with_steps(spec_of({"batch_size": 10}, epochs=epochs), {"t0": 100}).steps == steps


def test_an_evaluation_comes_about_once_an_epoch_of_the_longest_task() -> None:
    tasks = {"batch_size": 10}, {"batch_size": 10, "workers": 2}
    rows = {"t0": 128, "t1": 100}

    assert with_steps(spec_of(*tasks, epochs=3), rows).evaluate_every == 13
    assert with_steps(spec_of(*tasks, epochs=3, evaluate_every=5), rows).evaluate_every == 5
    assert with_steps(spec_of({"batch_size": 64}, epochs=3), {"t0": 10}).evaluate_every == 1


def test_a_job_records_the_steps_and_schedules_work_from_them(make_spec: MakeSpec) -> None:
    """24 images in batches of 8, for one worker of `pets` and two of `cars`."""
    tasks = {"pets": {}, "cars": {"workers": 2}}
    asked = make_spec(tasks, steps=None, epochs=2, evaluate_every=None, schedule={"name": "cosine"})

    job = Job(asked)

    assert (job.spec.steps, job.spec.epochs, job.spec.evaluate_every) == (6, None, 3)
    assert job.spec == make_spec(tasks, steps=6, evaluate_every=3, schedule={"name": "cosine"})
    assert Job(job.spec).spec == job.spec
    assert load_spec(asked, {"name": "other"}).epochs == 2


def test_all_workers_of_the_job_are_divided_before_the_steps_are_counted(make_spec: MakeSpec) -> None:
    job = Job(make_spec(steps=None, epochs=1, evaluate_every=None, workers=4))
    assert (job.spec.tasks[0].workers, job.steps) == (2, 2)


def test_a_warm_up_that_is_longer_than_the_epochs_is_refused(make_spec: MakeSpec) -> None:
    spec = make_spec(steps=None, epochs=1, schedule={"name": "cosine", "warm_up_rounds": 3})

    with pytest.raises(SpecError, match="warm_up_rounds is 3, but the job has 3 steps"):
        Job(spec)
