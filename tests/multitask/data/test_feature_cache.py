"""The store of features: what goes in comes out, whole files only, and nothing of another cache."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from multitask.data import DataError, feature_cache
from multitask.data.feature_cache import CachePlan, FeatureCache
from patches.files import LEFT_BEHIND_S
from tests.patches.helpers import images


def plan_of(folder: Path, backbone: str = "one", rows: int = 12) -> CachePlan:
    return CachePlan(folder, {"backbone": backbone, "steps": [1]}, rows, 4 * 3 * 16)


def features(rows: list[int]) -> dict[int, Tensor]:
    """Row r of a table of 12, channels last."""
    return {1: images(12, 4)[rows].contiguous(memory_format=torch.channels_last)}


def add(cache: FeatureCache, rows: list[int]) -> None:
    cache.add(np.array(rows), np.array(rows) % 4, features(rows))


def found(cache: FeatureCache, rows: list[int]) -> bool:
    """Whether all are stored; what is stored has to be right."""
    read = cache.read(np.array(rows))
    if read is not None:
        labels, stored = read
        assert labels.tolist() == [row % 4 for row in rows]
        assert torch.equal(stored[1], features(rows)[1])
        assert stored[1].stride() == features(rows)[1].stride()
    return read is not None


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*"))


def test_stored_rows_come_back_in_any_order_here_and_in_other_processes(tmp_path: Path) -> None:
    cache, other = plan_of(tmp_path).open(), plan_of(tmp_path).open()
    assert not found(cache, [1, 2])

    add(cache, [3, 1, 2])
    assert not found(other, [1, 2])
    assert found(cache, [2, 1, 3])
    add(other, [5, 2, 4])
    other.flush()

    assert found(cache, [4, 1, 5, 3])
    assert found(other, [5, 3])
    assert found(plan_of(tmp_path).open(), [1, 2, 3, 4, 5])
    assert not found(cache, [1, 6])


def test_a_row_is_written_once(tmp_path: Path) -> None:
    cache, other = plan_of(tmp_path).open(), plan_of(tmp_path).open()
    add(cache, [0, 1, 1])
    add(cache, [1, 0])
    add(other, [1, 0])
    cache.flush()
    other.flush()
    add(cache, [1, 0])
    cache.flush()

    assert len(files(tmp_path)) == 1
    assert found(other, [0, 1])


def test_the_modified_batch_does_not_change_what_waits(tmp_path: Path) -> None:
    cache = plan_of(tmp_path).open()
    computed = features([0, 1])
    cache.add(np.array([0, 1]), np.array([0, 1]), computed)
    computed[1].zero_()

    assert found(cache, [0, 1])


def test_a_file_is_written_when_enough_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "FILE_BYTES", 3 * 192)
    cache = plan_of(tmp_path).open()
    add(cache, [0, 1])
    assert not files(tmp_path)
    add(cache, [2, 3])
    assert len(files(tmp_path)) == 1

    monkeypatch.setattr(feature_cache, "WAIT_S", 0.0)
    add(cache, [4])
    assert len(files(tmp_path)) == 2


def test_another_backbone_has_another_folder_and_its_files_are_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = plan_of(tmp_path), plan_of(tmp_path, "two")
    cache = first.open()
    add(cache, [0, 1])
    cache.flush()
    assert not found(second.open(), [0, 1])
    assert first.path != second.path

    shutil.copytree(first.path, second.path)

    assert not found(second.open(), [0, 1])
    assert "holds features of another backbone" in caplog.text


def test_what_a_killed_process_left_half_written_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_of(tmp_path)
    cache = plan.open()
    add(cache, [0, 1])
    cache.flush()
    [path] = files(tmp_path)
    half = path.read_bytes()[: path.stat().st_size // 2]
    (plan.path / ".0.arrow.abc.tmp").write_bytes(half)
    (plan.path / "torn.arrow").write_bytes(half)
    path.rename(plan.path / "z.arrow")

    again = plan.open()
    assert found(again, [0, 1])
    assert not found(again, [2])
    assert "torn.arrow" in caplog.text


def test_what_a_killed_process_left_half_written_is_taken_away_at_the_next_writing(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    plan.path.mkdir(parents=True)
    killed, written_to = plan.path / ".0.arrow.abc.tmp", plan.path / ".1.arrow.abc.tmp"
    for path in (killed, written_to):
        path.write_bytes(b"half")
    os.utime(killed, (time.time() - 2 * LEFT_BEHIND_S,) * 2)

    cache = plan.open()
    add(cache, [0, 1])
    cache.flush()

    assert found(plan.open(), [0, 1])
    assert written_to.exists()
    assert not killed.exists()


def test_a_file_that_goes_while_it_is_used_is_written_again(tmp_path: Path) -> None:
    cache = plan_of(tmp_path).open()
    add(cache, [0, 1])
    cache.flush()
    assert found(cache, [0, 1])
    files(tmp_path)[0].unlink()

    assert not found(cache, [0, 1])
    add(cache, [0, 1])
    assert found(cache, [0, 1])


def test_a_disk_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "caches")
    plan.folder.mkdir()
    plan.path.write_text("a file where the folder should be")
    cache = plan.open()
    add(cache, [0])

    with pytest.raises(DataError, match=r"feature cache cannot be written.*cache_features"):
        cache.flush()


def test_the_plan_says_what_is_missing(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert plan.total_bytes == plan.missing_bytes() == 12 * (192 + 16)
    cache = plan.open()
    add(cache, list(range(12)))
    cache.flush()

    assert plan.missing_bytes() == 0
    assert plan.free_bytes() > 0
