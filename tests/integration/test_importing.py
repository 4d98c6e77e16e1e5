"""Imports run as Ray tasks, broken off and gone on with."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from multitask.data import DataError, TrainBatches, eval_batches, open_table
from multitask.data.importing import import_table
from multitask.data.sources import image_folder
from tests.multitask.data.tables import number_image

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@dataclass(frozen=True)
class Numbers:
    """Row i holds the picture of i; reading `fails_at` raises, and every row that is read is noted in a folder."""

    rows: int
    log: Path
    fails_at: int | None = None
    name: str = "numbers"
    classes: tuple[str, ...] = ("even", "odd", "unused")
    labels: NDArray[np.int64] = field(init=False)
    ids: pa.Array = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", np.arange(self.rows) % 2)
        object.__setattr__(self, "ids", pa.array([f"n/{i}" for i in range(self.rows)]))

    def read(self, rows: Sequence[int]) -> Iterator[bytes]:
        for row in rows:
            if row == self.fails_at:
                raise DataError(f"n/{row}: found no such file")
            (self.log / str(row)).touch()
            yield number_image(row)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").mkdir()
    return tmp_path / "log"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_splits_become_tables_that_share_the_rows(tmp_path: Path, log: Path) -> None:
    seen: list[tuple[int, int]] = []
    target = tmp_path / "out"
    rows = import_table(
        Numbers(50, log),
        str(target),
        splits={"train": 0.8, "test": 0.2},
        rows_per_shard=7,
        on_rows=lambda *done: seen.append(done),
    )
    train, test = open_table(target / "train"), open_table(target / "test")
    assert rows == {"train": train.num_rows, "test": test.num_rows} == {"train": 40, "test": 10}
    assert np.bincount(train.labels(), minlength=3).tolist() == [20, 20, 0]
    got = [table.row(i) for table in (train, test) for i in range(table.num_rows)]
    assert sorted(int(row.id.removeprefix("n/")) for row in got if row.id) == list(range(50))
    assert all(row.image == number_image(int(row.id[2:])) and row.label == int(row.id[2:]) % 2 for row in got if row.id)
    assert [int(row.id[2:]) for row in got if row.id][:40] != sorted(range(40)), "rows should be shuffled"
    assert seen[0] == (0, 50)
    assert seen[-1] == (50, 50)
    assert not (target / ".import").exists()


def test_rows_can_keep_their_order(tmp_path: Path, log: Path) -> None:
    import_table(Numbers(20, log), str(tmp_path / "out"), shuffle=False, rows_per_shard=6)
    table = open_table(tmp_path / "out")
    assert [table.row(i).id for i in range(20)] == [f"n/{i}" for i in range(20)]


def test_an_import_that_fails_goes_on_with_the_shards_that_are_missing(tmp_path: Path, log: Path) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    with pytest.raises(DataError, match="n/13: found no such file"):
        import_table(Numbers(60, log, fails_at=13), str(broken), shuffle=False, rows_per_shard=4)
    with pytest.raises(DataError, match="an import that was broken off goes on"):
        open_table(broken)
    finished = len(list((broken / ".import").glob("table-*.json")))
    assert 1 <= finished < 15
    # What a killed task leaves behind has no place in the table.
    (broken / ".shard-00003.parquet.0a1b2c3d.partial").write_bytes(b"half")
    for path in log.iterdir():
        path.unlink()
    import_table(Numbers(60, log), str(broken), shuffle=False, rows_per_shard=4)
    assert len(list(log.iterdir())) == 60 - 4 * finished
    import_table(Numbers(60, log), str(whole), shuffle=False, rows_per_shard=4)
    assert files(broken) == files(whole)


def test_another_import_does_not_go_on_where_one_stopped(tmp_path: Path, log: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(DataError, match="n/5"):
        import_table(Numbers(20, log, fails_at=5), str(target), rows_per_shard=4)
    before = files(target)
    with pytest.raises(DataError, match="unfinished import with other rows_per_shard, seed, expected the same"):
        import_table(Numbers(20, log), str(target), rows_per_shard=5, seed=1)
    with pytest.raises(DataError, match="unfinished import with other source"):
        import_table(Numbers(21, log), str(target), rows_per_shard=4)
    assert files(target) == before


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, log: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="found a folder that is not empty"):
        import_table(Numbers(4, log), str(tmp_path / "out"))
    assert files(tmp_path / "out") == {"thesis.txt": b"precious"}
    with pytest.raises(DataError, match=r"found zero images for \['b'\]"):
        import_table(Numbers(4, log), str(tmp_path / "new"), splits={"a": 0.99, "b": 0.01})
    assert not (tmp_path / "new").exists()


def test_training_reads_what_image_folder_gives_bit_for_bit(tmp_path: Path) -> None:
    """No image is encoded anew, and the table's tensors are those of torchvision's own reader and transforms."""
    random = np.random.default_rng(0)
    for row in range(24):
        folder = tmp_path / "source" / f"n0144{row % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (6 + row % 5, 9, 3), dtype=np.uint8).repeat(9, 0).repeat(8, 1)
        kind = {0: "png", 1: "L.jpg"}.get(row % 7, "jpg")
        image = Image.fromarray(pixels).convert("L" if kind == "L.jpg" else "RGB")
        image.save(folder / f"n0144{row % 3}_{row}.{kind}")
    mean, std, resolution = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 32
    reference = ImageFolder(
        tmp_path / "source",
        loader=lambda path: decode_image(path, ImageReadMode.RGB),
        transform=v2.Compose(
            [
                v2.Resize([resolution, resolution], antialias=True),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std),
            ]
        ),
    )
    import_table(image_folder(tmp_path / "source"), str(tmp_path / "table"), rows_per_shard=7)

    table = open_table(tmp_path / "table")
    row_of = {table.row(row).id: row for row in range(24)}
    options = {"batch_size": 5, "resolution": resolution, "mean": mean, "std": std}
    evaluated = list(eval_batches(table, **options))
    images, labels = (
        torch.cat([batch.images() for batch in evaluated]),
        torch.cat([batch.labels for batch in evaluated]),
    )
    trained = torch.cat([batch.images() for batch in islice(TrainBatches(table, seed=0, **options), 5)])[:24]
    seen = {image.numpy().tobytes() for image in trained}
    for (path, _), (image, label) in zip(reference.samples, reference, strict=True):
        row = row_of[str(Path(path).relative_to(tmp_path / "source"))]
        assert table.row(row).image == Path(path).read_bytes()
        assert torch.equal(images[row], image)
        assert labels[row] == label
        assert image.numpy().tobytes() in seen
    assert table.classes == tuple(reference.classes)


@pytest.mark.slow
def test_a_killed_import_ends_with_the_same_table(tmp_path: Path) -> None:
    source, killed, whole = tmp_path / "source", tmp_path / "killed", tmp_path / "whole"
    for row in range(210):
        folder = source / f"n0144{row % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row}.PNG").write_bytes(number_image(row))
    options = ["--split", "train=0.9", "--split", "validation=0.1", "--rows-per-shard", "2"]
    command = [sys.executable, "-m", "jobs.cli", "data", "import", "imagefolder", str(source), str(killed), *options]
    # A session of its own: Ray's processes go with the command, as they do when a machine goes.
    running = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(killed.glob(".import/*.json"))) < 12 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    finished = len(list(killed.glob(".import/train-*.json")))
    assert 10 <= finished < 90, "the import should have been killed half-way"
    assert not (killed / "train" / "index.json").exists()

    import_table(image_folder(source), str(killed), splits={"train": 0.9, "validation": 0.1}, rows_per_shard=2)
    import_table(image_folder(source), str(whole), splits={"train": 0.9, "validation": 0.1}, rows_per_shard=2)
    assert files(killed) == files(whole)
    assert open_table(killed / "train").num_rows == 3 * 63
