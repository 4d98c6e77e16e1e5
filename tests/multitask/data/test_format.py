import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from multitask.data import DataError, Row, write_table
from multitask.data.format import write_shard
from multitask.data.storage import locate
from tests.multitask.data.tables import CLASSES, number_image, small_table


def test_the_index_says_what_the_shards_hold(tmp_path: Path) -> None:
    index = json.loads((small_table(tmp_path / "train") / "index.json").read_text())
    shards = index.pop("shards")
    assert index == {"format": 1, "classes": CLASSES, "rows": 7, "rows_of_class": [3, 2, 2]}
    assert [shard["rows"] for shard in shards] == [3, 3, 1]
    assert [shard["bytes"] for shard in shards] == [(tmp_path / "train" / s["file"]).stat().st_size for s in shards]
    compression = pq.ParquetFile(tmp_path / "train" / shards[0]["file"]).metadata.row_group(0).column(0).compression
    assert compression == "ZSTD"


def test_equal_rows_give_equal_files(tmp_path: Path) -> None:
    first, second = small_table(tmp_path / "first"), small_table(tmp_path / "second")
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)


def test_an_existing_directory_is_left_as_it_is(tmp_path: Path) -> None:
    def rows() -> Iterator[tuple[bytes, int]]:
        raise AssertionError("no image should be read before the directory is refused")
        yield

    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"train exists, .* remove it first"):
        write_table(tmp_path / "train", rows(), CLASSES)
    assert list(tmp_path.rglob("*")) == [tmp_path / "train"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def rows() -> Iterator[tuple[bytes, int]]:
        yield from ((number_image(i), 0) for i in range(5))
        assert len(list(tmp_path.iterdir())) == 1, "the first shard should have been written by now"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_table(tmp_path / "train", rows(), CLASSES, rows_per_shard=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_the_classes_is_not_written(tmp_path: Path, label: int) -> None:
    rows = [(b"", 0)] * 5 + [(b"", label)]
    with pytest.raises(DataError, match=rf"train: row 1 of shard 2 has label {label}, but 3 classes allow 0 to 2"):
        write_table(tmp_path / "train", rows, CLASSES, rows_per_shard=2)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_fails_half_way_leaves_no_file(tmp_path: Path) -> None:
    target = locate(tmp_path / "train")
    with pytest.raises(DataError, match="label 3"):
        write_shard(target, 0, [Row(number_image(0), 0), Row(b"", 3)], CLASSES)
    assert target.names() == []


def test_zero_images_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train: found zero images, expected at least one"):
        write_table(tmp_path / "train", [], CLASSES)


@pytest.mark.parametrize(
    ("classes", "found"),
    [
        ([], "empty class list"),
        (["cat", "dog", "cat"], r"\['cat'\] more than once"),
        ("cat", "'cat'"),
        ([1, 2], "1, 2"),
        (["cat", "\ud800dog"], r"class name '\\ud800dog', which has a half of a character"),
    ],
)
def test_a_class_list_that_names_nothing_or_one_name_twice_is_refused(
    tmp_path: Path, classes: list[str], found: str
) -> None:
    with pytest.raises(DataError, match=found):
        write_table(tmp_path / "train", [(b"", 0)], classes)


def test_a_message_quotes_a_part_of_a_long_class_list(tmp_path: Path) -> None:
    for classes in (["x" * 10**6] * 2, "x" * 10**6, ["\ud800" * 10**6]):
        with pytest.raises(DataError) as caught:
            write_table(tmp_path / "train", [(b"", 0)], classes)
        assert len(str(caught.value)) < 600


def test_a_shard_needs_a_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows_per_shard is 0"):
        write_table(tmp_path / "train", [(b"", 0)], CLASSES, rows_per_shard=0)
