"""The header of a safetensors file: which tensors it lists, and whether they fill the file."""

import math
from pathlib import Path
from typing import Any

import torch

from patches.quoting import quoted
from patches.strict_json import parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Name in the header -> dtype."""
METADATA = "__metadata__"
"""The entry of the header that is no tensor."""
_MOST_AXES = 64


def read_layout(path: Path) -> dict[str, dict[str, Any]]:
    """Read the header of a file and check it as `check_layout` does.

    Raises:
        ValueError: there is no header, or `check_layout` refuses it.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        payload_bytes = path.stat().st_size - 8 - length
        if payload_bytes < 0:
            raise ValueError("the file ends before its header does")
        return check_layout(parse_json(file.read(length)), payload_bytes)


def check_layout(header: Any, payload_bytes: int) -> dict[str, dict[str, Any]]:
    """Check that the tensors which a header lists fill the rest of the file: without overlap and without a hole.

    Args:
        header: the header's JSON.
        payload_bytes: number of bytes after the header.
    Returns:
        Name of a tensor -> its `shape` and its `dtype` ("float32").
    Raises:
        ValueError: an entry is ill-formed, two tensors overlap, or bytes belong to no tensor. The message says what was
            found.
    """
    if not isinstance(header, dict):
        raise ValueError("a header that is no JSON object")
    entries = {name: entry for name, entry in header.items() if name != METADATA}
    spans = sorted((*_span(name, entry), name) for name, entry in entries.items())
    place = 0
    for start, end, name in spans:
        if start != place:
            kind = "overlaps the one before it" if start < place else "leaves a hole before it"
            raise ValueError(f"tensor {quoted(name)}, which {kind}: it begins at byte {start} of the data, not {place}")
        place = end
    if place != payload_bytes:
        raise ValueError(f"{payload_bytes} bytes of data, of which the tensors fill {place}")
    return {
        name: {"shape": entry["shape"], "dtype": str(DTYPES[entry["dtype"]]).removeprefix("torch.")}
        for name, entry in entries.items()
    }


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Return where a tensor's bytes begin and end, after checking the entry's form.

    Raises:
        ValueError: the entry is ill-formed.
    """
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end]} if (
            len(entry) == 3
            and dtype in DTYPES
            and len(shape) <= _MOST_AXES
            and all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, start, end))
            and math.prod(shape) * DTYPES[dtype].itemsize == end - start
        ):
            return start, end
    raise ValueError(f"an ill-formed entry for tensor {quoted(name)}: {quoted(entry)}")
