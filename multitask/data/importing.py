"""Importing a data set: its images are copied, as they are, into the shards of a table, in parallel on Ray.

What goes where is planned before the first image is read, from the labels alone. Each shard is one Ray task, and a
finished shard leaves a note of its counts and hash in the folder `.import`. An import that is broken off goes on at
the first shard without a note, and ends with the same bytes.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from PIL import Image

from multitask.data.format import ROWS_PER_SHARD, Row, check_classes, write_index, write_shard
from multitask.data.sources import Source
from multitask.data.storage import DataError, Location, locate

NOTES, PLAN = ".import", "plan.json"
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Shard:
    """One shard to write."""

    table: str
    """Name of the split, or "" for a single table."""
    number: int
    rows: NDArray[np.int64]
    """Rows of the source, in the order in which they are kept."""


def split_rows(labels: NDArray[np.int64], shares: Mapping[str, float], seed: int) -> dict[str, NDArray[np.int64]]:
    """Divide rows at random so that each class is divided in the same shares.

    Args:
        labels: shape (rows,).
        shares: split -> its share; they add up to 1. Within a class each split gets its share of the rows, rounded so
            that none is lost.
    Returns:
        Split -> row numbers, in ascending order.
    Raises:
        DataError: the shares are not above 0, or do not add up to 1.
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
    rows_per_shard: int = ROWS_PER_SHARD,
    on_rows: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, int]:
    """Write a source as one table, or as one for each split; started again after a break, it goes on.

    Args:
        target: where the table goes, or the folder of the splits' tables: a path or a URI.
        splits: split -> share of each class; None writes one table of all rows.
        shuffle: keep the rows in random order, so that a training window holds many classes; otherwise the source's.
        seed: of splits and order.
        max_side: pixels; a larger image is scaled down to this longer side and encoded anew as a JPEG of quality 95.
            None keeps every image's bytes.
        rows_per_shard: rows of every shard but a table's last.
        on_rows: called with the rows that are written so far, and with all rows, whenever a shard is done.
    Returns:
        Table ("" without splits) -> its rows.
    Raises:
        DataError: there is another table or import at `target`, an image cannot be read, or the options do not fit.
    """
    where = locate(target)
    classes = check_classes(source.classes, source.name)
    if max_side is not None and max_side < 8:
        raise DataError(f"max_side is {max_side}, expected 8 pixels or more. Choose a larger one.")
    tables = split_rows(source.labels, splits, seed) if splits else {"": np.arange(len(source.labels))}
    empty = [name or target for name, rows in tables.items() if not len(rows)]
    if empty:
        raise DataError(
            f"{source.name}: found zero images for {empty}, expected some. Give larger shares or more images."
        )
    notes = where.join(NOTES)
    _begin(where, notes, _plan(source, splits, shuffle, seed, max_side, rows_per_shard))
    random = np.random.default_rng(seed)
    shards = []
    for name, rows in tables.items():
        kept = random.permutation(rows) if shuffle else rows
        starts = range(0, len(kept), rows_per_shard)
        shards += [Shard(name, number, kept[start : start + rows_per_shard]) for number, start in enumerate(starts)]
    entries = _write_all(source, where, shards, max_side, on_rows)
    for name in tables:
        table = where.join(name) if name else where
        table.remove_partial()
        write_index(
            table, classes, [entry for shard, entry in zip(shards, entries, strict=True) if shard.table == name]
        )
    notes.remove()
    return {name: len(rows) for name, rows in tables.items()}


def _plan(source: Source, splits: Mapping[str, float] | None, *options: Any) -> dict[str, Any]:
    """What has to be the same for an import to go on where an earlier one stopped."""
    digest = hashlib.sha256(json.dumps(source.classes).encode())
    digest.update(source.labels.tobytes())
    for text in source.ids.to_pylist():
        digest.update(text.encode() + b"\0")
    names = ("shuffle", "seed", "max_side", "rows_per_shard")
    return {"source": digest.hexdigest(), "splits": splits and dict(splits), **dict(zip(names, options, strict=True))}


def _begin(target: Location, notes: Location, plan: dict[str, Any]) -> None:
    """Note the plan of a new import, or make sure that it is the one that was broken off here."""
    if notes.size(PLAN) is not None:
        found = json.loads(notes.read(PLAN))
        differing = sorted(key for key in plan if found.get(key) != plan[key])
        if differing:
            raise DataError(
                f"{target.where}: found an unfinished import with other {', '.join(differing)}, expected the same "
                "to go on with it. Repeat the command that began it, or remove the folder."
            )
    elif target.names():
        raise DataError(
            f"{target.where}: found a folder that is not empty, expected a new one. Choose another, or remove it first."
        )
    else:
        notes.write_json(PLAN, plan)


def _write_all(
    source: Source,
    target: Location,
    shards: Sequence[Shard],
    max_side: int | None,
    on_rows: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """The index's entry of each shard; those without a note are written, as many at once as Ray has CPUs."""
    notes = target.join(NOTES)
    noted = set(notes.names())
    entries = {i: json.loads(notes.read(_note(shard))) for i, shard in enumerate(shards) if _note(shard) in noted}
    done, total = sum(entry["rows"] for entry in entries.values()), sum(len(shard.rows) for shard in shards)
    on_rows(done, total)
    shared_source = ray.put(source)
    write = ray.remote(_write_one).options(max_retries=3)
    left = iter([i for i in range(len(shards)) if i not in entries])
    # A few more than there are CPUs: enough to keep them busy, few enough to stop soon after an error.
    at_once = int(ray.cluster_resources().get("CPU", 1)) + 2
    running: dict[Any, int] = {}
    while True:
        for number in islice(left, at_once - len(running)):
            running[write.remote(shared_source, target, shards[number], max_side)] = number
        if not running:
            break
        (finished, *_), _ = ray.wait(list(running))
        number = running.pop(finished)
        try:
            entries[number] = ray.get(finished)
        except ray.exceptions.RayTaskError as error:
            for call in running:
                ray.cancel(call)
            if running:  # nothing is written any more once the error is out
                ray.wait(list(running), num_returns=len(running))
            raise error.cause if isinstance(error.cause, DataError) else error from None
        done += entries[number]["rows"]
        on_rows(done, total)
    return [entries[i] for i in range(len(shards))]


def _note(shard: Shard) -> str:
    return f"{shard.table or 'table'}-{shard.number:05d}.json"


def _write_one(source: Source, target: Location, shard: Shard, max_side: int | None) -> dict[str, Any]:
    """Write one shard and its note. A task that is run again writes the same bytes."""
    table = target.join(shard.table) if shard.table else target
    entry = write_shard(table, shard.number, _rows(source, shard.rows, max_side), source.classes, source=source.name)
    target.join(NOTES).write_json(_note(shard), entry)
    return entry


def _rows(source: Source, rows: NDArray[np.int64], max_side: int | None) -> Iterator[Row]:
    images = source.read(rows.tolist())
    for row, image in zip(rows.tolist(), images, strict=True):
        name = source.ids[row].as_py()
        yield Row(image if max_side is None else limit_side(image, max_side, name), int(source.labels[row]), name)


def limit_side(image: bytes, max_side: int, name: str) -> bytes:
    """The image with its longer side at most `max_side` pixels; bytes of a small enough one are kept.

    Raises:
        DataError: the image cannot be decoded.
    """
    try:
        opened = Image.open(io.BytesIO(image))
        if max(opened.size) <= max_side:
            return image
        # A camera's note on how to turn the image is dropped: readers of the original bytes do not follow it either.
        pixels = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{name}: found an image that cannot be decoded ({error}), expected one to scale down. Remove it from the "
            "source, or import without a maximum side."
        ) from error
    pixels.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    pixels.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
