from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch

from multitask.job.job import Job
from multitask.job.rules import images_factor, make_schedule
from multitask.server.messages import as_tensor
from multitask.spec.schema import JobSpec
from tests.conftest import run_engine

MakeSpec = Callable[..., JobSpec]


def test_the_cosines_warm_up_is_part_of_the_jobs_steps(make_spec: MakeSpec) -> None:
    schedule = make_schedule(make_spec(steps=10, schedule={"name": "cosine", "warm_up_rounds": 4}))

    assert [schedule(done) for done in (0, 2, 4, 7, 10)] == pytest.approx([0, 0.005, 0.01, 0.005, 0])


def test_the_rate_per_256_images_counts_accumulated_ones(make_spec: MakeSpec) -> None:
    """Both tasks push 16 images, and the first step of plain SGD is the gradient times the rate."""

    def moved(rule: str) -> torch.Tensor:
        tasks = {"pets": {"accumulate": 2}, "cars": {"batch_size": 16}}
        sgd = {"name": "sgd", "rate": 1.0, "momentum": 0.0}
        spec = make_spec(tasks, steps=1, rate_rule=rule, optimizer=sgd)
        job = Job(spec)
        outcome = run_engine(job).outcome
        group = job.groups["private:pets"]
        end = group.layout.ends[1]
        return as_tensor(outcome.versions["last"].groups["private:pets"].values)[:end] - group.values[:end]

    fixed, scaled = moved("fixed"), moved("per_256_images")

    assert fixed.norm() > 0
    torch.testing.assert_close(scaled, fixed * 16 / 256, rtol=1e-3, atol=1e-7)


def test_a_task_may_train_on_its_validation_images_too(make_spec: MakeSpec) -> None:
    def images(train_on: str, batches: int) -> set[bytes]:
        job = Job(make_spec({"pets": {"train_on": train_on}}))
        found = islice(job.make_batches("pets/0"), batches)
        return {image.numpy().tobytes() for batch in found for image in batch.images()}

    # 24 images in each table, 8 in a batch: one epoch each.
    alone, both = images("train", 3), images("train+validation", 6)

    assert (len(alone), len(both)) == (24, 48)
    assert alone < both


def test_tasks_that_train_on_other_tables_share_no_decode(make_spec: MakeSpec) -> None:
    tasks: dict[str, dict[str, Any]] = {"pets_a": {}, "pets_b": {}, "pets_c": {"train_on": "train+validation"}}

    job = Job(make_spec(tasks))

    assert job.sharing(job.workers) == [["pets_a/0", "pets_b/0"], ["pets_c/0"]]


@pytest.mark.parametrize(
    ("engine", "shared", "private"),
    [
        ({"name": "async"}, 1, 1),
        ({"name": "local"}, 1, 1),
        ({"name": "local", "schedule": "rounds"}, 3, 2),
        ({"name": "sync"}, 3, 2),
        ({"name": "bounded", "staleness": 0}, 3, 2),
    ],
)
def test_an_update_has_the_images_of_a_push_or_of_a_round(
    make_spec: MakeSpec, engine: dict[str, Any], shared: int, private: int
) -> None:
    spec = make_spec({"pets": {"workers": 2}, "cars": {}}, rate_rule="per_256_images", engine=engine)

    assert images_factor(spec, ("pets", "cars")) == 8 * shared / 256
    assert images_factor(spec, ("pets",)) == 8 * private / 256
