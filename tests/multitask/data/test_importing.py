import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from multitask.data import DataError
from multitask.data.importing import limit_side, split_rows
from tests.multitask.data.tables import png


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_splits_divide_each_class_in_the_same_shares_and_lose_no_row(
    labels: list[int], parts: list[int], seed: int
) -> None:
    shares = {f"split {i}": part / sum(parts) for i, part in enumerate(parts)}
    split = split_rows(np.array(labels), shares, seed)
    assert sorted(np.concatenate(list(split.values())).tolist()) == list(range(len(labels)))
    for label in set(labels):
        rows = np.flatnonzero(np.array(labels) == label)
        for name, share in shares.items():
            assert abs(np.isin(rows, split[name]).sum() - share * len(rows)) <= 1


def test_splits_follow_the_seed() -> None:
    labels = np.arange(200) % 3
    first, again, other = (split_rows(labels, {"a": 0.5, "b": 0.5}, seed)["a"].tolist() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("shares", [{}, {"a": 0.5}, {"a": 1.2, "b": -0.2}, {"a": 0.0, "b": 1.0}])
def test_shares_that_do_not_add_up_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(DataError, match="expected shares above 0 that add up to 1"):
        split_rows(np.zeros(4, np.int64), shares, 0)


def test_only_larger_images_are_scaled_and_encoded_anew() -> None:
    random = np.random.default_rng(0)
    image = png(random.integers(0, 256, (30, 60, 3), dtype=np.uint8))
    assert limit_side(image, 60, "x") == image
    smaller = Image.open(io.BytesIO(limit_side(image, 40, "x")))
    assert (smaller.size, smaller.format, smaller.mode) == ((40, 20), "JPEG", "RGB")


def test_an_image_that_cannot_be_scaled_is_named() -> None:
    whole = png(np.zeros((80, 80, 3), np.uint8))
    for broken in (b"no image", whole[: len(whole) // 2]):
        with pytest.raises(DataError, match=r"cat/7\.png: found an image that cannot be decoded"):
            limit_side(broken, 40, "cat/7.png")
