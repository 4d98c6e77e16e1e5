import json
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multitask.data import DataError, open_table, open_tables, write_table
from multitask.data.table import ImageTable, RowGroup
from tests.multitask.data.tables import (
    CLASSES,
    encoded,
    number_image,
    numbered_table,
    rewrite_shard,
    small_table,
)


def edit_index(path: Path, **changes: object) -> None:
    index = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps(index | changes))


@settings(max_examples=25)
@given(
    rows=st.lists(st.tuples(st.binary(max_size=40), st.integers(0, 2)), min_size=1, max_size=30),
    rows_per_shard=st.integers(1, 31),
)
def test_a_table_returns_every_byte_label_and_place(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[bytes, int]], rows_per_shard: int
) -> None:
    path = tmp_path_factory.mktemp("table") / "train"
    write_table(path, iter(rows), CLASSES, rows_per_shard=rows_per_shard)
    table = open_table(path)

    assert table.classes == tuple(CLASSES)
    assert table.num_rows == len(rows)
    assert table.labels().dtype == np.int64
    assert list(zip(encoded(table), table.labels(), strict=True)) == rows
    assert [table.row(i)[:2] for i in range(len(rows))] == rows
    assert [table.source(i) for i in range(len(rows))] == [
        f"{path}/shard-{i // rows_per_shard:05d}.parquet, row {i % rows_per_shard}" for i in range(len(rows))
    ]


def test_a_shard_of_several_row_groups_keeps_rows_and_places(tmp_path: Path) -> None:
    rows = [(str(i).encode(), i % 3) for i in range(2500)]
    write_table(tmp_path / "train", rows, CLASSES, rows_per_shard=2400)
    assert pq.ParquetFile(tmp_path / "train/shard-00000.parquet").num_row_groups == 3

    table = open_table(tmp_path / "train")

    assert encoded(table) == [image for image, _ in rows]
    assert table.source(2399).endswith("shard-00000.parquet, row 2399")
    assert table.source(2400).endswith("shard-00001.parquet, row 0")


def test_tables_of_one_folder_open_as_a_single_one(tmp_path: Path) -> None:
    rows = {name: [(f"{name} {i}".encode(), i % 3) for i in range(count)] for name, count in (("a", 7), ("b", 4))}
    for name, content in rows.items():
        write_table(tmp_path / name, content, CLASSES, rows_per_shard=3)

    table = open_tables(str(tmp_path), ("a", "b"))

    assert list(zip(encoded(table), table.labels(), strict=True)) == rows["a"] + rows["b"]
    assert table.row(8)[:2] == rows["b"][1]
    assert table.source(8) == f"{tmp_path}/b/shard-00000.parquet, row 1"
    assert encoded(pickle.loads(pickle.dumps(table))) == encoded(table)


def test_tables_of_one_folder_are_joined_by_the_names_of_their_classes(tmp_path: Path) -> None:
    write_table(tmp_path / "a", [(b"x", 0), (b"y", 2)], CLASSES)
    write_table(tmp_path / "b", [(b"z", 0), (b"w", 1)], [CLASSES[2], CLASSES[0]])

    table = open_tables(str(tmp_path), ("a", "b"))

    assert (table.classes, table.labels().tolist()) == (tuple(CLASSES), [0, 2, 2, 0])
    write_table(tmp_path / "c", [(b"x", 0)], ["unheard"])
    with pytest.raises(DataError, match=r"c: found 'unheard', which the model does not know"):
        open_tables(str(tmp_path), ("a", "b", "c"))


def test_a_table_is_read_in_another_class_list_by_name(tmp_path: Path) -> None:
    write_table(tmp_path / "a", [(b"x", 0), (b"y", 1), (b"z", 2)], CLASSES, rows_per_shard=2)
    wider = ["first", *CLASSES[::-1]]

    table = pickle.loads(pickle.dumps(open_table(tmp_path / "a").in_classes(wider)))

    assert (table.classes, table.labels().tolist()) == (tuple(wider), [3, 2, 1])
    assert [table.row(row)[:2] for row in range(3)] == [(b"x", 3), (b"y", 2), (b"z", 1)]
    assert table.in_classes([*CLASSES, "last"]).labels().tolist() == [0, 1, 2]


def test_a_class_that_a_list_lacks_is_an_error_that_shows_both_lists(tmp_path: Path) -> None:
    names = [f"{number} {'long ' * 200}" for number in range(1000)]
    write_table(tmp_path / "a", [(b"x", 0)], [*names, "strange"])

    with pytest.raises(
        DataError, match=r"a: found 'strange', .* are '0 long .* and 997 more, .* '0 long .* 996 more\."
    ):
        open_table(tmp_path / "a").in_classes(names)
    with pytest.raises(DataError) as error:
        open_table(tmp_path / "a").in_classes([*names[1:], "\ud800"])
    assert len(str(error.value)) - len(str(tmp_path)) < 700


def test_rows_keep_their_place_when_arrow_splits_or_slices_a_column() -> None:
    chunks = pa.chunked_array([pa.array([b"-", b"a", b"bc"])[1:], pa.array([], pa.binary()), pa.array([b"d"])])
    for column in (chunks, chunks[1:]):
        group = RowGroup(column, np.zeros(len(column), np.int64), [None] * len(column))
        assert [group.encoded(i).numpy().tobytes() for i in range(len(group))] == column.to_pylist()


def test_large_images_lie_in_small_row_groups(tmp_path: Path) -> None:
    rows = [(bytes([i]) * (3 << 20), 0) for i in range(7)]
    write_table(tmp_path / "train", rows, CLASSES, rows_per_shard=5)
    table = open_table(tmp_path / "train")
    assert table.group_rows.tolist() == [2, 2, 1, 2]
    assert encoded(table) == [image for image, _ in rows]


def test_encoded_images_alias_arrow_memory(tmp_path: Path) -> None:
    group = open_table(small_table(tmp_path / "train")).read_group(0)
    first, second = group.encoded(0), group.encoded(1)
    assert second.data_ptr() == first.data_ptr() + len(first)


def test_an_opened_table_is_small_and_travels_to_other_processes(tmp_path: Path) -> None:
    path = tmp_path / "train"
    write_table(path, [(number_image(i) * 100, i % 3) for i in range(3000)], CLASSES)
    pickled = pickle.dumps(open_table(path))
    assert len(pickled) < 5000
    assert pickle.loads(pickled).row(2999) == (number_image(2999) * 100, 2, None)


def test_rows_come_in_the_order_that_was_asked_for_and_each_row_group_is_fetched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(tmp_path / "t", ((number_image(i), i % 3) for i in range(9)), CLASSES, rows_per_shard=3)
    table, fetch = open_table(tmp_path / "t"), ImageTable.read_group
    fetched: list[int] = []
    monkeypatch.setattr(ImageTable, "read_group", lambda table, group: (fetched.append(group), fetch(table, group))[1])

    assert table.rows([8, 0, 6, 8, 1]) == [(number_image(i), i % 3, None) for i in (8, 0, 6, 8, 1)]
    assert fetched == [0, 2]
    assert table.rows([]) == []


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_table_opens_from_a_path_or_a_uri(tmp_path: Path, prefix: str) -> None:
    assert open_table(f"{prefix}{small_table(tmp_path / 'train')}/").num_rows == 7


def test_a_table_is_written_to_and_read_from_another_filesystem(tmp_path: Path) -> None:
    uri = f"fsspec+memory://{tmp_path}/train"
    write_table(uri, ((number_image(i), i % 3, f"n{i}") for i in range(7)), CLASSES, rows_per_shard=3)
    table = pickle.loads(pickle.dumps(open_table(uri)))
    assert table.row(6) == (number_image(6), 0, "n6")
    assert table.source(6) == f"{uri}/shard-00002.parquet, row 0"
    with pytest.raises(DataError, match="train exists"):
        write_table(uri, [(b"", 0)], CLASSES)
    with pytest.raises(DataError, match=r"fsspec\+memory://.*/tran: found no index\.json"):
        open_table(f"fsspec+memory://{tmp_path}/tran")
    with pytest.raises(DataError, match="label 9"):
        write_table(f"fsspec+memory://{tmp_path}/bad", [(b"", 0), (b"", 9)], CLASSES, rows_per_shard=1)
    assert not any(tmp_path.name in name and "bad" in name for name in fsspec.filesystem("memory").store)


@pytest.mark.parametrize("index", [-1, 7])
def test_a_row_outside_the_table_is_an_error(tmp_path: Path, index: int) -> None:
    table = open_table(small_table(tmp_path / "train"))
    for read in (table.row, table.source):
        with pytest.raises(IndexError, match="rows 0 to 6"):
            read(index)


def test_a_label_outside_the_classes_is_named_with_file_and_row(tmp_path: Path) -> None:
    path = small_table(tmp_path / "train")
    shard = pq.read_table(path / "shard-00001.parquet")
    labels = pa.array([0, 3, -1], pa.int64())
    rewrite_shard(path, 1, shard.set_column(1, "label", labels).replace_schema_metadata(shard.schema.metadata))
    with pytest.raises(
        DataError, match=r"shard-00001.parquet, row 1: found label 3, but 3 classes allow 0 to 2 \(2 such rows"
    ):
        open_table(path)


def test_a_table_of_zero_images_is_refused(tmp_path: Path) -> None:
    path = small_table(tmp_path / "train")
    edit_index(path, rows=0, rows_of_class=[0, 0, 0], shards=[])
    with pytest.raises(DataError, match="found zero images"):
        open_table(path)


def test_a_missing_index_or_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: found no index\.json, expected an image table"):
        open_table(tmp_path / "nowhere")
    path = small_table(tmp_path / "train")
    (path / "shard-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"shard-00001\.parquet: found no such file"):
        open_table(path)


def test_a_location_of_no_known_filesystem_is_refused() -> None:
    with pytest.raises(DataError, match=r"nosuch://bucket/train: found a location that cannot be read"):
        open_table("nosuch://bucket/train")
    # A store that cannot be reached is an OSError of Arrow.
    with pytest.raises(DataError, match=r"hdfs://nowhere/train: found a location that cannot be read"):
        open_table("hdfs://nowhere/train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "found no table index"),
        ("[]", "found no table index"),
        ("{}", r"found no table index \(KeyError\('format'\)\), expected JSON with 'format'"),
        ('{"format": 2}', "found format 2, expected 1"),
        ("[" * 100_000, "found no table index"),
        ('{"format": "' + "x" * 100_000 + '"}', "found format 'xxx"),
        ('{"format": 1, "classes": ["\\ud800"], "rows": 1, "rows_of_class": [1], "shards": []}', "found class name"),
        ('{"format": 1}', "found None for 'classes' of the index, expected list"),
        (
            '{"format": 1, "classes": ["cat"], "rows": 1, "rows_of_class": [1], "shards": [{"file": 3}]}',
            "found 3 for 'file' of shard 0, expected str",
        ),
        (
            '{"format": 1, "classes": ["cat"], "rows": 1, "rows_of_class": [1], "shards": ["a"]}',
            "found 'a' for 'file' of shard 0, expected str",
        ),
    ],
)
def test_an_index_of_another_form_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = small_table(tmp_path / "train")
    (path / "index.json").write_text(text)
    with pytest.raises(DataError, match=rf"index\.json: {message}") as caught:
        open_table(path)
    assert len(str(caught.value)) < 1000


def test_further_keys_of_an_index_are_ignored(tmp_path: Path) -> None:
    path = small_table(tmp_path / "train")
    index = json.loads((path / "index.json").read_text())
    edit_index(path, shards=[shard | {"new": 1} for shard in index["shards"]], new=1)
    assert open_table(path).num_rows == 7


def test_counts_of_the_index_must_agree_with_the_shards(tmp_path: Path) -> None:
    path = small_table(tmp_path / "train")
    edit_index(path, rows=8)
    with pytest.raises(DataError, match=r"found 7 rows, \[3, 2, 2\] for each class, expected 8 rows"):
        open_table(path)
    edit_index(path, rows=7, rows_of_class=[2, 3, 2])
    with pytest.raises(DataError, match=r"expected 7 rows, \[2, 3, 2\]"):
        open_table(path)


def test_a_shard_with_another_number_of_rows_is_refused(tmp_path: Path) -> None:
    path = small_table(tmp_path / "train")
    rewrite_shard(path, 0, pq.read_table(path / "shard-00000.parquet").slice(1))
    with pytest.raises(DataError, match=r"shard-00000\.parquet: found 2 rows, expected 3 from the index"):
        open_table(path)


def test_an_edited_shard_is_refused_by_its_length_or_its_hash(tmp_path: Path) -> None:
    path = small_table(tmp_path / "train")
    shard = path / "shard-00000.parquet"
    content = bytearray(shard.read_bytes())
    shard.write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"found {len(content) - 1} bytes, expected {len(content)}"):
        open_table(path, verify=False)
    assert content[-60] != 0
    content[-60] = 0
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00000\.parquet: found SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        open_table(path)


def test_zeroed_or_changed_pages_are_found_without_the_hash_of_the_file(tmp_path: Path) -> None:
    write_table(tmp_path / "train", [(number_image(row), row % 3, f"n{row}") for row in range(40)], CLASSES)
    shard = tmp_path / "train" / "shard-00000.parquet"
    content, group = shard.read_bytes(), pq.ParquetFile(shard).metadata.row_group(0)
    table = open_table(tmp_path / "train")
    for column in (group.column(number) for number in range(3)):  # image, label and id
        stop = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size
        for changed in (
            content[: stop - 2] + bytes([content[stop - 2] ^ 1]) + content[stop - 1 :],
            content[: stop - 8] + bytes(8) + content[stop:],
        ):
            shard.write_bytes(changed)
            with pytest.raises(DataError, match=r"shard-00000\.parquet: cannot be read as Parquet"):
                open_table(tmp_path / "train", verify=False).read_group(0)
            if column.path_in_schema == "label":
                with pytest.raises(DataError, match=r"shard-00000\.parquet: cannot be read as Parquet"):
                    table.labels()


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = small_table(tmp_path / "train")
    shard = path / "shard-00000.parquet"
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(DataError, match=r"shard-00000\.parquet: cannot be read as Parquet"):
        open_table(path, verify=False)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": pa.array(["a", "b", "c"]), "label": pa.array([0, 1, 2])}, "found string as column 'image'"),
        ({"image": pa.array([b"a", b"b", b"c"]), "label": pa.array([0.0, 1.0, 2.0])}, "found double as column 'label'"),
        (
            {"image": pa.array([b"a", b"b", b"c"]), "label": pa.array([0.0, 1.0, 2.0])},
            "expected int64; regression is not supported: each image has a class",
        ),
        (
            {"image": pa.array([b"a", b"b", b"c"]), "label": pa.array([[0], [1], [0, 1]])},
            "found list<.*> as column 'label', expected int64; multi-label is not supported",
        ),
        ({"image": pa.array([b"a", b"b", b"c"])}, "found no such column as column 'label', expected int64"),
        ({"image": pa.array([b"a", b"b", b"c"]), "label": pa.array([0, 1, None])}, "row 2: found no label"),
    ],
)
def test_a_shard_of_another_schema_is_refused(tmp_path: Path, columns: dict[str, pa.Array], message: str) -> None:
    path = small_table(tmp_path / "train")
    metadata = pq.read_schema(path / "shard-00000.parquet").metadata
    rewrite_shard(path, 0, pa.table(columns).replace_schema_metadata(metadata))
    with pytest.raises(DataError, match=message):
        open_table(path)


def test_a_row_without_an_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = small_table(tmp_path / "train")
    columns = {"image": pa.array([b"a", None, b"c"]), "label": pa.array([0, 1, 2])}
    metadata = pq.read_schema(path / "shard-00000.parquet").metadata
    rewrite_shard(path, 0, pa.table(columns).replace_schema_metadata(metadata))
    with pytest.raises(DataError, match=r"shard-00000\.parquet, row 1: found no image, expected one in each row"):
        open_table(path).read_group(0)


def test_a_damaged_shard_is_left_out_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = small_table(tmp_path / "train")
    (path / "shard-00000.parquet").unlink()
    shard = path / "shard-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    table = open_table(path, damaged="skip")
    assert encoded(table) == [number_image(i) for i in (3, 4, 5)]
    assert [record.getMessage()[:17] for record in caplog.records] == ["Left out 3 rows: ", "Left out 1 rows: "]
    (path / "shard-00001.parquet").unlink()
    with pytest.raises(DataError, match="found zero images"):
        open_table(path, damaged="skip")


def test_a_shard_of_another_table_is_refused(tmp_path: Path) -> None:
    path = small_table(tmp_path / "train")
    write_table(tmp_path / "other", [(b"", 0)] * 3, ["dog", "cat", "bird"])
    rewrite_shard(path, 0, pq.read_table(tmp_path / "other/shard-00000.parquet"))
    with pytest.raises(DataError, match=r"as multitask\.classes in its schema.*another table"):
        open_table(path)


def test_further_columns_are_ignored(tmp_path: Path) -> None:
    path = small_table(tmp_path / "train")
    table = pq.read_table(path / "shard-00000.parquet")
    rewrite_shard(path, 0, table.append_column("source", pa.array(["a", "b", "c"])))
    assert open_table(path).row(2).image == number_image(2)


def test_data_errors_cross_process_borders(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        numbered_table(tmp_path / "train", 0)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is DataError
    assert str(copy) == str(caught.value)
