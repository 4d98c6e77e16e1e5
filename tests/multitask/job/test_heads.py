"""What a model's outputs mean: one name for each, from the training table or from what the run began with."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from multitask.data import DataError
from multitask.job.job import Job
from multitask.spec.errors import SpecError
from multitask.spec.schema import JobSpec
from tests.conftest import CLASSES, run_engine, write_named

MakeSpec = Callable[..., JobSpec]
SHARED = {"method": "scale_bias", "num_classes": None}


def data(folder: Path, train: list[str], validation: list[str] | None = None) -> str:
    write_named(folder / "train", train)
    write_named(folder / "validation", train if validation is None else validation, seed=100)
    return str(folder)


def labels(job: Job, worker: str, batches: int = 3) -> list[str]:
    """Return the class names of a worker's first images."""
    classes = job.classes[job.workers[worker]]
    return [classes[label] for batch in islice(job.make_batches(worker), batches) for label in batch.labels.tolist()]


def test_a_method_that_owns_the_head_gets_an_output_for_each_class(make_spec: MakeSpec, tmp_path: Path) -> None:
    own = {"data": data(tmp_path / "three", CLASSES[:3]), "num_classes": None}

    job = Job(make_spec({"pets": own, "cars": {"num_classes": None}}))

    # The backbone's own head has 4 outputs, as many as `cars` has classes, which therefore starts from a copy of it.
    assert [task.num_classes for task in job.spec.tasks] == [3, None]
    _, private = job.state({})
    assert private["pets"]["classifier.1.weight"].shape[0] == 3
    assert torch.equal(private["cars"]["classifier.1.weight"], job.backbone.network.state_dict()["classifier.1.weight"])
    assert job.classes == {"pets": tuple(CLASSES[:3]), "cars": tuple(CLASSES)}
    # A trial of a sweep goes on with the spec of its plan, in which the number is left out.
    again = Job(make_spec({"pets": own}), kept={"pets": ("more", *CLASSES[:3])})
    assert again.spec.tasks[0].num_classes is None
    assert Job(make_spec({"pets": own}), kept={"pets": tuple(CLASSES[:3])}).spec.tasks[0].num_classes == 3


@pytest.mark.parametrize(
    ("task", "backbone", "message"),
    [
        ({"num_classes": 5}, 4, r"4 classes.*5 outputs\. Set tasks\.num_classes to 4 or leave it out"),
        ({"num_classes": 3}, 4, r"4 classes.*3 outputs\. Set tasks\.num_classes to 4 or leave it out"),
        ({"method": "scale_bias", "num_classes": 5}, 4, r"5 outputs\. Set tasks\.num_classes to 4, or import"),
        (
            SHARED,
            10,
            r"4 classes.*backbone's own head.*10 outputs\. Set backbone\.num_classes to 4, add '\+last_layer'",
        ),
        (SHARED, 2, r"4 classes.*backbone's own head.*2 outputs\. Set backbone\.num_classes to 4"),
    ],
)
def test_a_head_of_another_size_is_refused(
    make_spec: MakeSpec, task: dict[str, Any], backbone: int, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        Job(make_spec({"pets": task}, backbone={"num_classes": backbone}))


def test_tables_that_stand_in_for_others_may_have_fewer_classes(make_spec: MakeSpec) -> None:
    job = Job(make_spec({"pets": {"num_classes": 6}, "cars": SHARED}, backbone={"num_classes": 5}), stand_ins=True)

    assert {name: len(classes) for name, classes in job.classes.items()} == {"pets": 6, "cars": 5}
    assert set(labels(job, "cars/0")) == set(CLASSES)


def test_tasks_on_one_head_have_one_class_list_by_name(make_spec: MakeSpec, tmp_path: Path) -> None:
    other = data(tmp_path / "other", CLASSES[::-1])

    job = Job(make_spec({"pets": SHARED, "cars": {"data": other, **SHARED}}))

    assert job.classes == {"pets": tuple(CLASSES), "cars": tuple(CLASSES)}
    in_own_order = Job(make_spec({"cars": {"data": other}}))
    assert in_own_order.classes == {"cars": tuple(CLASSES[::-1])}
    assert labels(job, "cars/0") == labels(in_own_order, "cars/0")


def test_tasks_on_one_head_with_other_classes_are_refused(make_spec: MakeSpec, tmp_path: Path) -> None:
    other = data(tmp_path / "other", [*CLASSES[:3], "class x"])

    with pytest.raises(SpecError, match=r"'pets' and 'cars' share .*head, .* differ: 'class 3', .* and 'class x', "):
        Job(make_spec({"pets": SHARED, "cars": {"data": other, **SHARED}}))


def test_validation_classes_are_matched_by_name_and_none_may_be_new(make_spec: MakeSpec, tmp_path: Path) -> None:
    orders = {"same": ["class 0", "class 2"], "other": ["class 2", "class 0"]}
    folders = {name: data(tmp_path / name, CLASSES, order) for name, order in orders.items()}

    runs = {name: run_engine(Job(make_spec({"pets": {"data": folder}}))) for name, folder in folders.items()}

    same, other = ([evaluation.metrics for evaluation in runs[name].evaluations] for name in orders)
    assert same == other
    assert len({metrics["pets"]["loss"] for metrics in same}) > 1
    more = data(tmp_path / "more", CLASSES[:3], CLASSES)
    with pytest.raises(DataError, match=r"validation: found 'class 3', which the model does not know"):
        Job(make_spec({"pets": {"data": more, "num_classes": None}}))


def test_tasks_with_other_class_lists_share_no_stream(make_spec: MakeSpec) -> None:
    """A task that goes on has the class list that it began with, whatever order the table has now."""
    spec = make_spec({"pets_old": {}, "pets_new": {}})

    job = Job(spec, kept={"pets_old": tuple(CLASSES[::-1])})

    assert job.sharing(job.workers) == [["pets_old/0"], ["pets_new/0"]]
    assert Job(spec).sharing(job.workers) == [["pets_old/0", "pets_new/0"]]
    assert labels(job, "pets_old/0") == labels(job, "pets_new/0")


def test_a_task_that_joins_takes_the_class_list_of_the_shared_head(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec({"pets": SHARED})
    other = data(tmp_path / "other", CLASSES[::-1])

    job = Job(spec).changed(make_spec({"cars": {"data": other, **SHARED}, "pets": SHARED}))

    assert job.classes == {"cars": tuple(CLASSES), "pets": tuple(CLASSES)}
