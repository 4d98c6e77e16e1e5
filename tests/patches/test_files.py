"""Files are written whole or not at all, and a full disk is named with the bytes that a file needs."""

import os
from pathlib import Path

import pytest

from multitask.data.storage import locate
from patches.files import DiskFullError, atomic_file, existing_folder, read_regular, write_atomic
from tests.disk import full_disk


def test_a_full_disk_is_named_with_what_is_needed_and_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_atomic(path, b"older")

    with full_disk(1000), pytest.raises(DiskFullError) as full:
        write_atomic(path, bytes(5000))

    assert f"'{path}' needs at least 5,000 bytes, and " in str(full.value)
    assert "Make room" in str(full.value)
    assert path.read_bytes() == b"older"
    assert os.listdir(tmp_path) == [path.name]
    write_atomic(path, bytes(5000))
    assert path.stat().st_size == 5000


def write_in_pieces(path: Path, size_bytes: int) -> None:
    with atomic_file(path, size_bytes) as file:
        for _ in range(100):
            file.write(bytes(1024))


def test_a_file_that_is_written_piece_by_piece_names_the_larger_of_what_it_has_and_what_is_known(
    tmp_path: Path,
) -> None:
    for known, needed in ((0, "4,096"), (70_000, "70,000")):
        with full_disk(4096), pytest.raises(DiskFullError, match=f"at least {needed} bytes"):
            write_in_pieces(tmp_path / "package", known)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_named_for_a_table_or_a_checkpoint_too(tmp_path: Path) -> None:
    folder = locate(tmp_path)
    with full_disk(1000), pytest.raises(DiskFullError, match=r"shard\.parquet' needs at least 5,000 bytes"):
        folder.write("shard.parquet", bytes(5000))
    assert os.listdir(tmp_path) == []


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")

    assert read_regular(tmp_path / "file", most_bytes=5) == b"12345"
    with pytest.raises(ValueError, match="larger than 4 bytes"):
        read_regular(tmp_path / "file", most_bytes=4)
    for name in ("link", "device", "folder", "pipe"):
        with pytest.raises(ValueError, match="not a regular file"):
            read_regular(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "nothing")


def test_the_folder_of_what_is_not_there_yet_is_the_nearest_above_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file", tmp_path / "file" / "x", tmp_path / "new" / "x"):
        assert existing_folder(path) == tmp_path
