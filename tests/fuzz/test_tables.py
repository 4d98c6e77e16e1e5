"""Damaged tables: even without the comparison of whole files, a table has its rows or is refused."""

from pathlib import Path
from random import Random

from multitask.data import DataError, open_table, write_table
from tests.fuzz.damage import damaged
from tests.fuzz.harness import fuzz
from tests.multitask.data.tables import CLASSES, number_image

ROWS = [(number_image(row), row % 3, f"image {row}") for row in range(12)]


def test_a_table_has_its_rows_or_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    write_table(folder, iter(ROWS), CLASSES, rows_per_shard=6)
    whole = {path: path.read_bytes() for path in sorted(folder.iterdir())}

    def make(random: Random) -> bytes:
        changed = random.choice(list(whole))
        data = damaged(random, whole[changed])
        for path, content in whole.items():
            path.write_bytes(data if path == changed else content)
        return data

    def read(_: bytes) -> None:
        table = open_table(folder, verify=False)
        assert table.classes == tuple(CLASSES)
        groups = list(table.groups())
        rows = [
            (group.encoded(row).numpy().tobytes(), int(group.labels[row]))
            for group in groups
            for row in range(len(group))
        ]
        assert rows == [(image, label) for image, label, _ in ROWS], "a change was not found"
        ids = [name for group in groups for name in group.ids]
        # A table may have no column of ids, so one whose name has changed is not missed.
        assert all(name in (None, wanted) for name, (_, _, wanted) in zip(ids, ROWS, strict=True)), "an id has changed"
        assert table.labels().tolist() == [label for _, label, _ in ROWS]

    fuzz("tables", 60, (DataError,), make, read)
