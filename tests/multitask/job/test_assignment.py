"""Division of a job's workers among its tasks."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import multitask
from multitask.job.assignment import check_workers, share_out
from multitask.job.job import Job
from multitask.spec.errors import SpecError
from multitask.spec.schema import JobSpec
from tests.conftest import MakeData

MakeSpec = Callable[..., JobSpec]


@pytest.mark.parametrize(
    ("workers", "images", "expected"),
    [
        (16, [1_281_167, 1_803_460], [7, 9]),
        (4, [3, 3, 3], [2, 1, 1]),
        (10, [1_000_000, 1, 1], [8, 1, 1]),
        (3, [5, 500, 50], [1, 1, 1]),
        # 3.3, 2.2 and 0.5 of 6: the third has its one, and the others share 5 as 3 to 2.
        (6, [30, 20, 4], [3, 2, 1]),
    ],
)
def test_workers_follow_the_images(workers: int, images: list[int], expected: list[int]) -> None:
    assert list(share_out(workers, dict(zip("abc", images, strict=False))).values()) == expected


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=8), st.integers(0, 100))
def test_all_are_given_out_each_task_has_one_and_more_images_never_mean_fewer(images: list[int], more: int) -> None:
    workers = len(images) + more
    shares = list(share_out(workers, dict(zip(map(str, range(len(images))), images, strict=True))).values())
    assert sum(shares) == workers
    assert min(shares) >= 1
    pairs = sorted(zip(images, shares, strict=True))
    for (fewer_images, fewer), (more_images, most) in pairwise(pairs):
        assert fewer_images == more_images or fewer <= most


def test_each_worker_needs_a_row_of_its_own() -> None:
    check_workers({"pets": 3, "cars": 1}, {"pets": 3, "cars": 9})
    with pytest.raises(SpecError, match="Task 'pets' has 4 workers, but its training table has 3 rows"):
        check_workers({"cars": 1, "pets": 4}, {"pets": 3, "cars": 9})


@pytest.mark.parametrize("workers", [{"workers": 9}, {"tasks": {"pets": {"workers": 9}}}], ids=["jobs", "tasks"])
def test_more_workers_than_rows_are_refused_before_the_run_has_a_directory(
    make_spec: MakeSpec, make_data: MakeData, workers: dict
) -> None:
    spec = make_spec(**{"tasks": {"pets": {}}} | workers)
    few = make_data(rows=8)
    spec = replace(spec, tasks=tuple(replace(task, data=few) for task in spec.tasks))

    with pytest.raises(SpecError, match="has 9 workers, but its training table has 8 rows"):
        multitask.train(spec)

    assert not spec.run_directory.exists()


def test_the_runs_spec_has_the_workers_of_each_task(make_spec: MakeSpec, make_data: MakeData) -> None:
    tasks = {"pets": {"data": make_data(rows=8)}, "cars": {"data": make_data(rows=24)}}
    spec = make_spec(tasks, workers=4, steps=1)

    job = Job(spec)
    assert list(job.workers) == ["pets/0", "cars/0", "cars/1", "cars/2"]
    assert Job(job.spec).spec == job.spec
    run = multitask.train(spec)

    assert run.spec.workers is None
    assert {task.name: task.workers for task in run.spec.tasks} == {"pets": 1, "cars": 3}
    assert run.result["tasks"]["cars"]["pushes"] == 3
