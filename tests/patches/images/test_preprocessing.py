import dataclasses
import json
from typing import Any, get_args, get_type_hints

import pytest

from multitask.spec.schema import TaskSpec
from patches import PatchError, Preprocessing
from patches.images.preprocessing import SQUASH, Framing, Resize

OLD = {"resolution": 16, "interpolation": "bilinear", "mean": [0.5, 0.25, 0.0], "std": [0.25, 0.5, 1.0]}
"""What a bundle of version 0.1 holds."""
VALUES = (16, (0.5, 0.25, 0.0), (0.25, 0.5, 1.0))


def test_a_bundle_of_version_0_1_squashes_and_a_bundle_that_squashes_is_as_then() -> None:
    assert Preprocessing.from_json(OLD) == Preprocessing(*VALUES, "squash")
    assert Preprocessing(*VALUES).as_json() == OLD
    assert Preprocessing.from_json({key: OLD[key] for key in ("resolution", "mean", "std")}).framing == SQUASH


@pytest.mark.parametrize("resize", get_args(Resize))
def test_json_gives_back_what_it_was_given(resize: Resize) -> None:
    preprocessing = Preprocessing(*VALUES, resize)
    assert Preprocessing.from_json(json.loads(json.dumps(preprocessing.as_json()))) == preprocessing
    assert len({preprocessing, dataclasses.replace(preprocessing, mean=[0.5, 0.25, 0.0])}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 16.0}, "resolution=16.0: use a whole number from 2 to 8192"),
        ({"resolution": True}, "resolution"),
        ({"resolution": 10**9}, "resolution"),
        ({"resolution": 1}, "resolution"),
        ({"mean": None}, "mean=None: use three numbers"),
        ({"mean": "abc"}, "mean"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"std": [0.25, 0.25, 0.0]}, "std=.* three numbers above 0"),
        ({"std": [0.25, 0.25, "0.25"]}, "std"),
        ({"std": [0.25, 0.25, float("nan")]}, "std"),
        ({"resize": "stretch"}, "resize='stretch': use squash, center_crop or pad"),
        ({"interpolation": "bicubic"}, "expected interpolation 'bilinear', found 'bicubic'"),
        ({"crop_fraction": 0.9}, "found also crop_fraction"),
    ],
)
def test_what_is_no_preprocessing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchError, match=message):
        Preprocessing.from_json(OLD | changes)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(PatchError, match="found no mean, std"):
        Preprocessing.from_json({"resolution": 16})


def test_a_job_spec_has_the_ways_to_resize_that_there_are() -> None:
    assert get_type_hints(TaskSpec)["resize"] == Resize


def test_the_border_has_the_pixel_value_closest_to_the_mean() -> None:
    mean = (0.485, -0.1, 1e308)
    assert Preprocessing(16, mean, (1.0, 1.0, 1.0), "pad").framing == Framing("pad", (124, 0, 255))
    assert Preprocessing(16, mean, (1.0, 1.0, 1.0), "center_crop").framing == Framing("center_crop")
