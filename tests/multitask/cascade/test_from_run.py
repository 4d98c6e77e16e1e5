"""From a finished run to a package, in one call."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multitask import train
from multitask.cascade import CascadeError, CascadeModel, check, load_cascade, read_predictions
from multitask.cascade.cascade import answers_of
from multitask.cascade.from_run import cascade_from_run
from multitask.data import open_table
from multitask.run.directory import Run
from multitask.spec.schema import JobSpec
from patches.images.decoding import decode
from tests.conftest import MakeData

IMAGES = 120
MakeSpec = Callable[..., JobSpec]


@pytest.fixture
def run(make_spec: MakeSpec, make_data: MakeData) -> Run:
    """Two resolutions of one data set."""
    group: dict[str, Any] = {"resolution": [8, 12], "method": "scale_bias", "num_classes": None}
    data = make_data(rows=IMAGES, seed=7, size=16)
    return train(make_spec({"pets": {"data": data, **group}}, steps=30, evaluate_every=30))


def test_the_package_answers_the_test_images_as_their_predictions_say(run: Run, tmp_path: Path) -> None:
    cascade, test = cascade_from_run(run, tmp_path / "pets.cascade", min_relative_accuracy=0.9)

    assert load_cascade(tmp_path / "pets.cascade") == cascade
    assert set(test.logits) == {"pets@8", "pets@12"}
    table = open_table(run.spec.tasks[0].data + "/test")
    images = [decode(torch.frombuffer(bytearray(table.row(row).image), dtype=torch.uint8)) for row in range(IMAGES)]
    answers = CascadeModel.load(tmp_path / "pets.cascade")(images)
    expected = answers_of(cascade.point(), test)
    for name in ("labels", "stages", "costs"):
        np.testing.assert_array_equal(getattr(answers, name), getattr(expected, name))


def test_half_of_the_validation_images_fits_and_no_test_image_does(run: Run, tmp_path: Path) -> None:
    cascade, test = cascade_from_run(run, tmp_path / "pets.cascade")

    validation = read_predictions(run.directory / "predictions" / "validation")
    fitting, untouched = validation.halves(seed=0)
    assert cascade.point().images == len(fitting) == IMAGES // 2
    assert cascade.costs.alone["pets@8"] < cascade.costs.alone["pets@12"]
    for others in (untouched, test):
        assert check(cascade, others).images == len(others)
    with pytest.raises(CascadeError, match="thresholds were fitted on"):
        check(cascade, validation)


def test_what_else_lies_among_the_predictions_is_not_read(run: Run, tmp_path: Path) -> None:
    folder = run.directory / "predictions" / "validation"
    folder.mkdir(parents=True)
    (folder / "older.parquet").write_bytes(b"of another run")

    cascade, _ = cascade_from_run(run, tmp_path / "pets.cascade")

    assert set(cascade.costs.alone) == {"pets@8", "pets@12"}


def test_tasks_over_several_data_sets_make_no_cascade(make_spec: MakeSpec, tmp_path: Path) -> None:
    # Both have the same number of images with the same labels: their predictions alone would not tell.
    run = train(make_spec({"pets": {}, "cars": {}}, steps=1, evaluate_every=1))

    with pytest.raises(CascadeError, match="one data set"):
        cascade_from_run(run, tmp_path / "mixed.cascade")
    assert not (tmp_path / "mixed.cascade").exists()
