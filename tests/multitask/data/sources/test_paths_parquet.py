from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from multitask.data import DataError
from multitask.data.sources import paths_parquet
from tests.multitask.data.sources.trees import check_source, write_images

PATHS = ["photos/c.jpg", "photos/a.jpg", "b.jpg"]


def write(path: Path, /, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint32()])
def test_numbers_are_labels(tmp_path: Path, kind: pa.DataType) -> None:
    images = write_images(tmp_path, PATHS)
    file = write(tmp_path / "train.parquet", path=PATHS, label=pa.array([2, 0, 2], kind), weight=[1.0, 2.0, 3.0])

    source = paths_parquet(file)

    check_source(source, images, [2, 0, 2], PATHS)
    assert source.classes == ("0", "1", "2")
    assert source.name == "train"
    assert paths_parquet(file, classes=["x", "y", "z", "w"]).classes == ("x", "y", "z", "w")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_names_are_sorted_unless_given(tmp_path: Path, kind: pa.DataType) -> None:
    images = write_images(tmp_path, PATHS)
    file = write(tmp_path / "t.parquet", file=pa.array(PATHS, kind), species=pa.array(["owl", "bat", "owl"], kind))

    source = paths_parquet(file, "file", "species")

    check_source(source, images, [1, 0, 1], PATHS)
    assert source.classes == ("bat", "owl")
    given = paths_parquet(file, "file", "species", classes=["owl", "cat", "bat"])
    assert given.labels.tolist() == [0, 2, 0]
    assert given.classes == ("owl", "cat", "bat")


def test_a_folder_of_tables_elsewhere_with_absolute_paths(tmp_path: Path) -> None:
    top = tmp_path / "images"
    images = write_images(top, PATHS)
    (tmp_path / "lists").mkdir()
    write(tmp_path / "lists" / "b.parquet", path=PATHS[2:], label=[1])
    write(
        tmp_path / "lists" / "a.parquet", path=[str(top / path) for path in PATHS[:2]], label=pa.array([0, 1], "int32")
    )

    check_source(paths_parquet(tmp_path / "lists", root=top), images, [0, 1, 1], PATHS)
    by_uri = paths_parquet((tmp_path / "lists").as_uri(), root=top.as_uri())
    check_source(by_uri, images, [0, 1, 1], PATHS)
    assert by_uri.name == "lists"


@pytest.mark.parametrize(
    ("paths", "labels", "message"),
    [
        (["b.jpg", "../x.jpg"], [0, 1], r"t.parquet: entry 2 .* '../x.jpg'"),
        (["b.jpg", "/x.jpg"], [0, 1], r"entry 2 .* '/x.jpg'"),
        (["b.jpg", None], [0, 1], r"entry 2 .* None"),
        (["b.jpg", "b.jpg"], [0, 1], "'b.jpg' and 0 more images are listed more than once"),
        (["b.jpg", "gone/b.jpg"], [0, 1], "1 of 2 files are missing .* first 'gone/b.jpg'"),
        (["b.jpg"], [None], "labels are of type null|row 0 has no label"),
        (["b.jpg"], pa.array([None], pa.int64()), "row 0 has no label"),
        (["b.jpg"], [0.5], "labels are of type double; regression is not supported: each image has a class"),
        (["b.jpg"], [[0, 1]], "labels are of type list<.*>; multi-label is not supported: .* exactly one class"),
        (["b.jpg"], pa.array([[0, 1]], pa.list_(pa.int8(), 2)), "multi-label is not supported"),
        (["b.jpg"], [10**12], "labels such as 1000000000000, expected 0 to 99999"),
        (pa.array([], pa.string()), pa.array([], pa.int64()), "found zero images"),
        ([[1]], [0], "paths are not strings"),
    ],
)
def test_a_row_that_cannot_be_is_named(tmp_path: Path, paths: list, labels: list, message: str) -> None:
    write_images(tmp_path, PATHS)
    file = write(tmp_path / "t.parquet", path=paths, label=labels)
    with pytest.raises(DataError, match=message):
        paths_parquet(file)


def test_what_is_no_such_table_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, PATHS)
    file = write(tmp_path / "t.parquet", path=["b.jpg"], label=["owl"])
    with pytest.raises(DataError, match=r"no column 'image', found \['path', 'label'\]"):
        paths_parquet(file, path_column="image")
    with pytest.raises(DataError, match="row 0 has label 'owl', which is not among the 2 given classes"):
        paths_parquet(file, classes=["bat", "cat"])
    with pytest.raises(DataError, match="found no Parquet file"):
        paths_parquet(tmp_path / "photos")
    with pytest.raises(DataError, match="pyarrow cannot open this URI"):
        paths_parquet("what://t.parquet")
    file.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        paths_parquet(file)
