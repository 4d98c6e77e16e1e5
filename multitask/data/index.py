"""The index of an image table: what `index.json` says about its classes and shards."""

import json
from dataclasses import dataclass
from typing import Any

from multitask.data.format import FORMAT_VERSION, INDEX_NAME, check_classes
from multitask.data.storage import REMAKE, DataError, Location
from patches.quoting import quoted

INDEX_FIELDS = {"classes": list, "rows": int, "rows_of_class": list, "shards": list}
SHARD_FIELDS = {"file": str, "rows": int, "bytes": int, "sha256": str, "groups": list}


@dataclass(frozen=True)
class TableShard:
    """One shard of a table, as the index describes it."""

    file: str
    """Path of the Parquet file, relative to the directory of the table."""
    rows: int
    bytes: int
    """Size of the file."""
    sha256: str
    """SHA-256 of the file, as hexadecimal digits."""
    groups: tuple[int, ...]
    """Number of rows of each row group."""
    classes: tuple[str, ...]
    """Class names of the table that the file was written for. A label in the file is a position in this list."""


@dataclass(frozen=True)
class TableIndex:
    """The content of a table's index."""

    classes: tuple[str, ...]
    """Class names. Label i means `classes[i]`."""
    rows: int
    """Number of rows in all shards together."""
    rows_of_class: list[int]
    """Number of rows of each class."""
    shards: tuple[TableShard, ...]


def read_index(location: Location) -> TableIndex:
    """Read the index of the table at `location`.

    Raises:
        DataError: the index is missing, incomplete, of another format version, or its class list is invalid.
    """
    name = f"{location.where}/{INDEX_NAME}"
    if location.size(INDEX_NAME) is None:
        raise DataError(
            f"{location.where}: found no {INDEX_NAME}, expected an image table. Check the location of the table. If "
            "its import was interrupted, start the same import again: an import that was broken off goes on."
        )
    try:
        content = json.loads(location.read(INDEX_NAME))
        version = content["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{name}: found no table index ({quoted(error)}), expected JSON with 'format'. {REMAKE}"
        ) from error
    if version != FORMAT_VERSION:
        raise DataError(
            f"{name}: found format {quoted(version)}, expected {FORMAT_VERSION}. Read the table with the version of "
            "this program that wrote it, or write the table anew."
        )
    problem = _problem(content)
    if problem:
        raise DataError(f"{name}: {problem}. {REMAKE}")
    classes = check_classes(content["classes"], name)
    return TableIndex(
        classes=classes,
        rows=content["rows"],
        rows_of_class=content["rows_of_class"],
        shards=tuple(_shard(entry, classes) for entry in content["shards"]),
    )


def _shard(entry: dict[str, Any], classes: tuple[str, ...]) -> TableShard:
    """Return what an entry of the index says about a shard. Further keys are ignored."""
    values = {key: entry[key] for key in SHARD_FIELDS}
    return TableShard(**values | {"groups": tuple(values["groups"]), "classes": classes})


def _problem(content: dict[str, Any]) -> str | None:
    """Return a description of the first field that is missing or has another type, or None if all fields fit."""
    entries = [("the index", content, INDEX_FIELDS)]
    if isinstance(content.get("shards"), list):
        entries += [(f"shard {number}", shard, SHARD_FIELDS) for number, shard in enumerate(content["shards"])]
    for name, entry, expected in entries:
        for key, kind in expected.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                found = quoted(entry.get(key) if isinstance(entry, dict) else entry)
                return f"found {found} for '{key}' of {name}, expected {kind.__name__}"
    return None
