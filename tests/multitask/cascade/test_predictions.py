from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from multitask.cascade import CascadeError, Predictions, predictions_writer, read_predictions

LOGITS = np.array([[0.0, 1.0], [2.0, 0.0], [0.5, 0.25]], dtype=np.float32)


def write(folder: Path, model: str = "a", **columns: Any) -> Path:
    """A file as another program may write it."""
    content = {"row": [7, 3, 5], "label": [1, 0, 1], "logits": LOGITS.tolist(), **columns}
    pq.write_table(
        pa.table({name: values for name, values in content.items() if values is not None}), folder / f"{model}.parquet"
    )
    return folder


def test_what_is_written_in_parts_is_read_whole(tmp_path: Path) -> None:
    with predictions_writer(tmp_path / "a.parquet", classes=2) as add:
        add(np.array([0, 1]), np.array([1, 0]), LOGITS[:2])
        add(np.array([2]), np.array([1]), LOGITS[2:])

    found = read_predictions(tmp_path)

    assert list(found.logits) == ["a"]
    assert np.array_equal(found.logits["a"], LOGITS)
    assert (found.rows.tolist(), found.labels.tolist()) == ([0, 1, 2], [1, 0, 1])
    assert found.right("a").tolist() == [True, True, False]


def test_nothing_is_left_where_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(IndexError), predictions_writer(tmp_path / "a.parquet", classes=2) as add:
        add(np.array([0, 1]), LOGITS[9], LOGITS[:2])
    assert not list(tmp_path.iterdir())


def test_files_in_other_orders_and_types_meet_by_row(tmp_path: Path) -> None:
    write(tmp_path, "a")
    order = [2, 0, 1]
    logits = pa.array(LOGITS[order].astype(np.float64).tolist(), pa.list_(pa.float64(), 2))
    write(tmp_path, "b", row=[5, 7, 3], label=pa.array([1, 1, 0], pa.int8()), logits=logits)

    found = read_predictions(tmp_path)

    assert found.rows.tolist() == [3, 5, 7]
    assert np.array_equal(found.logits["a"], LOGITS[[1, 2, 0]])
    assert np.array_equal(found.logits["a"], found.logits["b"])
    assert list(read_predictions(tmp_path, ["b"]).logits) == ["b"]


def test_rows_may_be_names(tmp_path: Path) -> None:
    found = read_predictions(write(tmp_path, row=["x.png", "a.png", "b.png"]))
    assert found.rows.tolist() == ["a.png", "b.png", "x.png"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": None}, "found no such column as column 'label', expected integers"),
        ({"label": [0.5, 1.0, 0.0]}, "found double as column 'label'"),
        ({"label": [None, 1, 0]}, "found 1 rows without label"),
        ({"label": [0, 2, 0]}, "Row 3: found label 2, but 2 classes allow 0 to 1"),
        ({"row": [1, 2, 1]}, "found row 1 more than once"),
        ({"row": [1.5, 2.0, 3.0]}, "as column 'row', expected integers or strings"),
        ({"logits": [[1.0, 2.0], [1.0], [0.0, 1.0]]}, "found logits of 1 and of 2 classes"),
        ({"logits": [[1.0], [1.0], [0.0]]}, "at least 2"),
        ({"logits": [1.0, 1.0, 0.0]}, "expected lists of floats"),
        (
            {"logits": [[1.0, float("nan")], [1.0, 0.0], [0.0, 1.0]]},
            "1 rows with logits that are not finite, such as row 7",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    write(tmp_path, **columns)
    with pytest.raises(CascadeError, match=message):
        read_predictions(tmp_path)


def write_names(folder: Path, model: str, names: list[str], labels: list[int], logits: Any) -> None:
    with predictions_writer(folder / f"{model}.parquet", len(names), names) as add:
        add(np.arange(len(labels)), np.array(labels), np.array(logits, dtype=np.float32))


def test_models_with_other_class_orders_are_matched_by_name(tmp_path: Path) -> None:
    write_names(tmp_path, "a", ["x", "y", "z"], [0, 1, 2], [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    write_names(tmp_path, "b", ["z", "x", "y"], [1, 2, 0], [[2, 0, 1], [5, 3, 4], [8, 6, 7]])

    found = read_predictions(tmp_path)

    assert (found.names, found.labels.tolist()) == (("x", "y", "z"), [0, 1, 2])
    assert np.array_equal(found.logits["a"], found.logits["b"])
    assert found.take(np.array([1])).names == found.only(["b"]).names == found.halves(0)[0].names == found.names
    write_names(tmp_path, "c", ["x", "y", "w"], [0, 1, 2], [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    with pytest.raises(CascadeError, match="'a' and 'c' have different classes: 'z', 'x', 'y', and 'w', 'x', 'y'"):
        read_predictions(tmp_path)


@pytest.mark.parametrize("names", [b"[", b"7", b'["x"]', b'["x", "x"]', b'["x", 2]', b"[" * 100_000])
def test_damaged_class_names_are_named(tmp_path: Path, names: bytes) -> None:
    table = pq.read_table(write(tmp_path) / "a.parquet").replace_schema_metadata({"multitask.classes": names})
    pq.write_table(table, tmp_path / "a.parquet")

    with pytest.raises(CascadeError, match="expected 2 distinct class names") as error:
        read_predictions(tmp_path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"row": [7, 3, 6]}, "found 2 that only one of them has, such as 5, 6"),
        ({"label": [1, 1, 1]}, "found 1 and 0 for row 3"),
        ({"logits": [[0.0, 1.0, 2.0]] * 3}, "answer the same question"),
    ],
)
def test_files_about_different_images_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    write(tmp_path, "a")
    write(tmp_path, "b", **columns)
    with pytest.raises(CascadeError, match=message):
        read_predictions(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: read_predictions(folder), "holds no predictions"),
        (lambda folder: read_predictions(write(folder), ["aa"]), "Did you mean 'a'"),
        (
            lambda folder: [(folder / "a.parquet").write_bytes(b"no"), read_predictions(folder)],
            "cannot be read as Parquet",
        ),
        (lambda folder: read_predictions(write(folder)).only(["aa"]), "Did you mean 'a'"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    with pytest.raises(CascadeError, match=message):
        make(tmp_path)


def test_halves_hold_every_image_once_and_know_their_own() -> None:
    predictions = Predictions(
        np.arange(9), np.arange(9) % 2, {"a": np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)}
    )
    one, other = predictions.halves(seed=1)

    assert sorted([*one.rows, *other.rows]) == list(range(9))
    of_one, of_other = (set(half.fingerprints("a", range(len(half)))) for half in (one, other))
    assert of_one.isdisjoint(of_other)
    assert of_one | of_other == set(predictions.fingerprints("a", range(9)))
    assert np.array_equal(one.rows, predictions.halves(seed=1)[0].rows)
    assert set(one.rows) != set(predictions.halves(seed=2)[0].rows)
