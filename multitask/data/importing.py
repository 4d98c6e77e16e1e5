"""Importing a data set: its images are copied into the shards of a table, in parallel on Ray.

The labels alone decide which image goes into which shard, so this is planned before the first image is read. One Ray
task writes one shard, and then a note with the shard's counts and hash in the folder `.import`. When an interrupted
import is started again, it writes only the shards that have no note yet, and the table has the same bytes as if the
import had never stopped.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from multitask.data.encoding import limit_side, readable
from multitask.data.format import ROWS_PER_SHARD, Row, check_classes, write_index, write_shard
from multitask.data.sources import Source
from multitask.data.storage import DataError, Location, locate
from patches.files import DiskFullError
from patches.images.orientation import without_orientation
from patches.quoting import shortened

NOTES, PLAN = ".import", "plan.json"
"""Folder of the notes about finished shards, and the file in it that describes the import."""
Encode = Callable[[bytes, str], bytes]
"""Function that returns the bytes to store, given the bytes and the name of an image."""


@dataclass(frozen=True)
class PlannedShard:
    """One shard that an import writes."""

    table: str
    """Name of the split, or "" for a single table."""
    number: int
    """Number of the shard in its table, from 0."""
    rows: NDArray[np.int64]
    """Rows of the source, in the order in which the shard stores them."""

    @property
    def note(self) -> str:
        """Name of the note that says that this shard is finished."""
        return f"{self.table or 'table'}-{self.number:05d}.json"


def split_rows(labels: NDArray[np.int64], shares: Mapping[str, float], seed: int) -> dict[str, NDArray[np.int64]]:
    """Divide rows at random over splits, so that every split gets the same share of each class.

    Args:
        labels: label of each row, shape (rows,).
        shares: split -> its share. The shares add up to 1. They are rounded to whole rows within each class, and every
            row goes to exactly one split.
        seed: seed of the random choice.
    Returns:
        Split -> row numbers, in ascending order.
    Raises:
        DataError: a share is not above 0, or the shares do not add up to 1.
    """
    if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise DataError(f"Splits {dict(shares)}: expected shares above 0 that add up to 1. Correct the shares.")
    bounds = np.cumsum([0.0, *shares.values()])
    bounds[-1] = 1.0
    random = np.random.default_rng(seed)
    chosen: dict[str, list[NDArray[np.int64]]] = {name: [] for name in shares}
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(bounds * len(rows)).astype(int)
        for name, start, stop in zip(shares, cuts, cuts[1:], strict=False):
            chosen[name].append(rows[start:stop])
    return {name: np.sort(np.concatenate(parts)) for name, parts in chosen.items()}


def import_table(
    source: Source,
    target: str,
    *,
    splits: Mapping[str, float] | None = None,
    shuffle: bool = True,
    seed: int = 0,
    max_side: int | None = None,
    ignore_orientation: bool = False,
    rows_per_shard: int = ROWS_PER_SHARD,
    on_rows: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, int]:
    """Write a source as one table, or as one table for each split.

    If an earlier call with the same arguments was interrupted, this call continues its work.

    Args:
        source: the images and labels.
        target: path or URI of the table or, with `splits`, of the folder of the tables.
        splits: split -> its share of the rows of each class. None writes a single table with all rows.
        shuffle: store the rows in random order, so that a shuffle window of training contains many classes. Without
            it, the rows keep the order of the source.
        seed: seed of the splits and of the order.
        max_side: longest allowed side of an image, in pixels. A larger image is scaled down and encoded as a JPEG of
            quality 95. None allows any.
        ignore_orientation: clear the EXIF orientation of every image, so that it is read as its pixels are stored.
        rows_per_shard: number of rows in every shard except the last one of a table.
        on_rows: called at the start and after each finished shard, with the number of rows written so far and the
            number of all rows.
    Returns:
        Table ("" without splits) -> number of its rows.
    Raises:
        DataError: `target` contains another table or another unfinished import, an image cannot be read, or an option
            is out of range.
        DiskFullError: the disk is full. The same call goes on once there is room.
    """
    where = locate(target)
    classes = check_classes(source.classes, source.name)
    if max_side is not None and max_side < 8:
        raise DataError(f"max_side is {max_side}, expected 8 pixels or more. Choose a larger number.")
    tables = split_rows(source.labels, splits, seed) if splits else {"": np.arange(len(source.labels))}
    empty = [name or target for name, rows in tables.items() if not len(rows)]
    if empty:
        raise DataError(
            f"{source.name}: found zero images for {empty}, expected some. Give larger shares or more images."
        )
    notes = where.join(NOTES)
    _begin(where, notes, _plan(source, splits, shuffle, seed, max_side, ignore_orientation, rows_per_shard))
    shards = _planned_shards(tables, shuffle, seed, rows_per_shard)
    encode = partial(_encode, max_side=max_side, ignore_orientation=ignore_orientation)
    entries = _write_all(source, where, shards, encode, on_rows)
    for name in tables:
        table = where.join(name) if name else where
        table.remove_partial()
        write_index(
            table, classes, [entry for shard, entry in zip(shards, entries, strict=True) if shard.table == name]
        )
    notes.delete(PLAN)  # the import is done: without its plan, what is left of the notes means nothing
    notes.remove()
    return {name: len(rows) for name, rows in tables.items()}


def _planned_shards(
    tables: Mapping[str, NDArray[np.int64]], shuffle: bool, seed: int, rows_per_shard: int
) -> list[PlannedShard]:
    """Divide the rows of each table over shards."""
    random = np.random.default_rng(seed)
    shards = []
    for name, rows in tables.items():
        ordered = random.permutation(rows) if shuffle else rows
        starts = range(0, len(ordered), rows_per_shard)
        parts = [ordered[start : start + rows_per_shard] for start in starts]
        shards += [PlannedShard(name, number, part) for number, part in enumerate(parts)]
    return shards


def _plan(source: Source, splits: Mapping[str, float] | None, *options: Any) -> dict[str, Any]:
    """Return everything that must be equal for an import to continue an earlier one."""
    digest = hashlib.sha256(json.dumps(source.classes).encode())
    digest.update(source.labels.tobytes())
    for text in source.ids.to_pylist():
        digest.update(text.encode() + b"\0")
    names = ("shuffle", "seed", "max_side", "ignore_orientation", "rows_per_shard")
    return {"source": digest.hexdigest(), "splits": splits and dict(splits), **dict(zip(names, options, strict=True))}


def _begin(target: Location, notes: Location, plan: dict[str, Any]) -> None:
    """Write down the plan of a new import, or check that it equals the plan of the unfinished import at `target`.

    Raises:
        DataError: `target` contains another unfinished import, or files that no import left there.
    """
    if notes.size(PLAN) is not None:
        found = _read_note(notes, PLAN)
        differing = sorted(key for key in plan if found.get(key) != plan[key])
        if differing:
            raise DataError(
                f"{target.where}: found an unfinished import with other {', '.join(differing)}, expected the same "
                "values, so that it can go on. Repeat the command that started it, or remove the folder."
            )
    elif set(target.names()) - {NOTES}:  # the notes alone are those of an import that was killed at its start
        raise DataError(
            f"{target.where}: found a folder that is not empty, expected a new one. Choose another, or remove it first."
        )
    else:
        notes.write_json(PLAN, plan)


def _read_note(notes: Location, name: str) -> dict[str, Any]:
    """Read the plan of an import, or the note about a finished shard.

    Raises:
        DataError: the file is damaged.
    """
    try:
        note: dict[str, Any] = dict(json.loads(notes.read(name)))
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{notes.where}/{name}: found a damaged note of an unfinished import ({shortened(error)}). Remove the "
            "whole folder of the import, and start it again."
        ) from error
    return note


def _write_all(
    source: Source,
    target: Location,
    shards: Sequence[PlannedShard],
    encode: Encode,
    on_rows: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Write all shards that have no note yet, several at the same time.

    Returns:
        The entry of each shard for the index.
    """
    notes = target.join(NOTES)
    noted = set(notes.names())
    entries = {i: _read_note(notes, shard.note) for i, shard in enumerate(shards) if shard.note in noted}
    done, total = sum(entry["rows"] for entry in entries.values()), sum(len(shard.rows) for shard in shards)
    on_rows(done, total)
    shared_source = ray.put(source)
    write = ray.remote(_write_one).options(max_retries=3)
    left = iter([i for i in range(len(shards)) if i not in entries])
    # Slightly more tasks than CPUs keep every CPU busy, and still end soon after an error.
    at_once = int(ray.cluster_resources().get("CPU", 1)) + 2
    running: dict[Any, int] = {}
    while True:
        for number in islice(left, at_once - len(running)):
            running[write.remote(shared_source, target, shards[number], encode)] = number
        if not running:
            break
        (finished, *_), _ = ray.wait(list(running))
        number = running.pop(finished)
        try:
            entries[number] = ray.get(finished)
        except ray.exceptions.RayTaskError as error:
            for call in running:
                ray.cancel(call)
            if running:  # wait, so that no task writes any more after the error is raised
                ray.wait(list(running), num_returns=len(running))
            raise error.cause if isinstance(error.cause, DataError | DiskFullError) else error from None
        done += entries[number]["rows"]
        on_rows(done, total)
    return [entries[i] for i in range(len(shards))]


def _write_one(source: Source, target: Location, shard: PlannedShard, encode: Encode) -> dict[str, Any]:
    """Write one shard and its note, and return its entry for the index. A repeated call writes the same bytes."""
    table = target.join(shard.table) if shard.table else target
    entry = write_shard(table, shard.number, _rows(source, shard.rows, encode), source.classes, source=source.name)
    target.join(NOTES).write_json(shard.note, entry)
    return entry


def _encode(image: bytes, name: str, *, max_side: int | None, ignore_orientation: bool) -> bytes:
    """Return the bytes that a table stores for an image, which are those of its file wherever this is possible."""
    image = readable(without_orientation(image) if ignore_orientation else image, name)
    return image if max_side is None else limit_side(image, max_side, name)


def _rows(source: Source, rows: NDArray[np.int64], encode: Encode) -> Iterator[Row]:
    """Read rows of the source, one after the other."""
    images = source.read(rows.tolist())
    for row, image in zip(rows.tolist(), images, strict=True):
        name = source.ids[row].as_py()
        yield Row(encode(image, name), int(source.labels[row]), name)
