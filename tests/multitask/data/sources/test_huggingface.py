import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from multitask.data import DataError
from multitask.data.sources import huggingface
from tests.multitask.data.sources.trees import check_source, image

BEANS = ["angular_leaf_spot", "bean_rust", "healthy"]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, images: list[Any], labels: list[Any], names: list[str] | None = BEANS, rows: int = 2) -> Path:
    """As `datasets.Dataset.to_parquet` does."""
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    table = pa.table({"image": pa.array(images, IMAGE), "label": labels})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=rows)
    return path


def row(number: int) -> dict[str, Any]:
    return {"bytes": image(number), "path": f"healthy_{number}.jpg"}


def write_beans(root: Path) -> list[str]:
    """Two training files of 5 and 3 rows; the ids."""
    files = [f"train-0000{part}-of-00002-abcdef0123456789.parquet" for part in range(2)]
    write(root / "data" / files[0], [row(number) for number in range(5)], [0, 1, 2, 0, 1])
    write(root / "data" / files[1], [row(number) for number in range(5, 8)], [2, 2, 0])
    return [f"{files[0]}/{number}" for number in range(5)] + [f"{files[1]}/{number}" for number in range(3)]


def test_rows_come_with_the_metadatas_classes(tmp_path: Path) -> None:
    ids = write_beans(tmp_path)
    labels = [0, 1, 2, 0, 1, 2, 2, 0]

    source = huggingface(tmp_path / "data")

    check_source(source, [image(number) for number in range(8)], labels, ids)
    assert source.classes == tuple(BEANS)
    assert source.name == "data"
    assert huggingface(tmp_path / "data", classes=["a", "b", "c", "d"]).classes == ("a", "b", "c", "d")
    assert huggingface((tmp_path / "data").as_uri()).ids.equals(source.ids)


def test_each_row_group_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_beans(tmp_path)
    source = huggingface(tmp_path / "data")
    read, seen = pq.ParquetFile.read_row_group, []

    def counting(file: pq.ParquetFile, number: int, **options: Any) -> pa.Table:
        seen.append((file.metadata.num_rows, number))
        return read(file, number, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)

    assert list(source.read([7, 0, 3, 1, 2, 7])) == [image(number) for number in [7, 0, 3, 1, 2, 7]]
    assert seen == [(3, 1), (5, 0), (5, 1)]


def test_splits_are_kept_apart(tmp_path: Path) -> None:
    write_beans(tmp_path)
    write(tmp_path / "data" / "validation-00000-of-00001.parquet", [row(9)], [1])

    with pytest.raises(DataError, match=r"splits \['train', 'validation'\], expected one"):
        huggingface(tmp_path)
    assert len(huggingface(tmp_path / "data" / "train-*.parquet").labels) == 8


@pytest.mark.parametrize(
    ("files", "place"),
    [
        (["default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"], "default/test"),
        (["default/partial-train/0000.parquet", "default/validation/0000.parquet"], "default/partial-train"),
        (["train.parquet", "test.parquet"], "test.parquet"),
        (["train_1.parquet", "train_2.parquet", "val_1.parquet", "val_2.parquet"], r"train_\*.parquet"),
    ],
)
def test_splits_in_folders_and_names_are_kept_apart(tmp_path: Path, files: list[str], place: str) -> None:
    for file in files:
        write(tmp_path / file, [row(0)], [0])
    with pytest.raises(DataError, match=rf"has the splits .*, expected one\. .* are '{tmp_path}/{place}'"):
        huggingface(tmp_path)
    assert len(huggingface((tmp_path / files[0]).parent if "/" in files[0] else tmp_path / files[0]).labels) in (1, 2)


def test_files_of_one_split_are_one_table(tmp_path: Path) -> None:
    for file in ("a.parquet", "b.parquet", "deep/c.parquet"):
        write(tmp_path / "train" / file, [row(0)], [0])
    assert len(huggingface(tmp_path).labels) == len(huggingface(tmp_path / "train").labels) == 3


def test_arrow_files_say_how_they_become_parquet(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "data-00000-of-00001.arrow").write_bytes(b"")
    for place in (tmp_path, tmp_path / "train"):
        with pytest.raises(DataError, match=r"`save_to_disk` .*load_from_disk\(FOLDER\)\.to_parquet"):
            huggingface(place)


def test_files_stand_in_for_missing_bytes(tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", [row(0), {"bytes": None, "path": "images/1.jpg"}], [0, 1])
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(image(1))
    source = huggingface(file)

    check_source(source, [image(0), image(1)], [0, 1], ["t.parquet/0", "t.parquet/1"])
    (tmp_path / "images" / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"'t.parquet/1': cannot read .*images/1.jpg"):
        list(source.read([1]))


@pytest.mark.parametrize("bad", [None, {"bytes": None, "path": None}, {"bytes": b"", "path": "../x.jpg"}])
def test_a_row_without_image_is_named(tmp_path: Path, bad: Any) -> None:
    source = huggingface(write(tmp_path / "t.parquet", [row(0), row(1), bad], [0, 1, 2]))
    with pytest.raises(DataError, match=r"'t.parquet/2' \(file/row\): no bytes in .*t.parquet"):
        list(source.read([0, 2]))


def test_labels_without_metadata(tmp_path: Path) -> None:
    numbers = write(tmp_path / "n.parquet", [row(0), row(1)], [0, 3], names=None)
    assert huggingface(numbers).classes == ("0", "1", "2", "3")
    names = write(tmp_path / "s.parquet", [row(0), row(1)], ["rust", "healthy"], names=None)
    assert huggingface(names).classes == ("healthy", "rust")
    assert huggingface(names).labels.tolist() == [1, 0]


def test_files_that_cannot_be_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.parquet", [row(0)], [0])
    other = write(tmp_path / "b.parquet", [row(0)], [0], names=["cat", "dog"])
    with pytest.raises(DataError, match="different class names for column 'label'"):
        huggingface([first, other])
    assert len(huggingface([first, other], classes=BEANS).labels) == 2
    with pytest.raises(DataError, match="labels such as -1, expected 0 to 2"):
        huggingface(write(tmp_path / "test.parquet", [row(0)], [-1]))
    with pytest.raises(DataError, match=r"no column 'img', found \['image', 'label'\]"):
        huggingface(first, image_column="img")
    with pytest.raises(DataError, match="column 'label' is of type int64, expected a struct"):
        huggingface(first, image_column="label")
    with pytest.raises(DataError, match="labels are not of one type"):
        huggingface([first, write(tmp_path / "c.parquet", [row(0)], ["rust"])])
    with pytest.raises(DataError, match="empty list of Parquet files"):
        huggingface([])


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [row(0)], [0])
    source = huggingface(file)
    file.unlink()
    with pytest.raises(DataError, match=r"a.parquet: cannot be read as Parquet"):
        list(source.read([0]))
