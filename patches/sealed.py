"""Sealed files: safetensors files with a JSON manifest in their header. Bundles and folded networks are such files.

The manifest begins with the payload hash: a SHA-256 of the whole file, in which the 64 digits of the hash itself count
as zeros. It covers header, manifest and tensors, so that a changed byte anywhere is found before a value is used.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from patches.errors import BundleError
from patches.files import write_atomic
from patches.quoting import quoted, shortened
from patches.strict_json import parse_json
from patches.structure import dtype_name, not_finite
from patches.tensor_layout import METADATA, check_layout

BUNDLE, FOLDED = "bundle", "folded network"
"""The kinds of sealed files. The manifest of a bundle does not name its kind, so that older versions can read it."""
UNSEALED = "0" * 64
"""The payload hash while it is computed. `seal` replaces it."""
AGAIN = "Fetch or export the file again."
"""Advice for a file that is damaged."""
_HASH_START = rb'"manifest":"{\"payload_sha256\":\"'
"""The bytes right before the payload hash. The manifest is JSON within a string of the header's JSON."""
_READERS = {BUNDLE: "patches.load_bundle", FOLDED: "patches.load_folded"}


def write_sealed(
    path: str | os.PathLike[str], kind: str, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Write tensors, bit for bit, and their manifest, atomically.

    Args:
        path: the file to write.
        kind: `BUNDLE` or `FOLDED`.
        manifest: everything but the payload hash and the list of the tensors, which are added here.
        tensors: the tensors, on any device and in any memory format.
    Returns:
        The complete manifest.
    Raises:
        BundleError: JSON cannot hold a value of the manifest, or a tensor holds NaN or infinity.
        OSError: the folder cannot be written, or the disk is full.
    """
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    check_finite(path, kind, copies)
    # The hash must be the first entry, where `seal` looks for it.
    whole = {"payload_sha256": UNSEALED, **manifest, "tensors": describe(copies)}
    try:
        text = json.dumps(whole, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BundleError(
            f"{kind.capitalize()} '{path}': expected preprocessing and metrics that JSON can hold, found one it "
            f"cannot: {error}. Use numbers (no NaN), strings, lists and dicts."
        ) from error
    data, digest = seal(safetensors.torch.save(copies, {"manifest": text}))
    write_atomic(path, data)
    return {**json.loads(text), "payload_sha256": digest}


def seal(data: bytes) -> tuple[bytes, str]:
    """Write the payload hash into a file whose manifest still has zeros in its place.

    Args:
        data: the whole file. Its manifest begins with `payload_sha256`, which is `UNSEALED`.
    Returns:
        The finished file, and the hash (hex).
    """
    start = data.index(_HASH_START) + len(_HASH_START)
    digest = _hash_but(data, start)
    return data[:start] + digest.encode() + data[start + len(UNSEALED) :], digest


def read_sealed(
    path: str | os.PathLike[str], kind: str, version: int, well_formed: Callable[[dict[str, Any]], bool]
) -> tuple[dict[str, Any], bytes]:
    """Read a file and check its kind, its format, its hash, its manifest and the layout of its tensors.

    Args:
        path: the file.
        kind: the expected kind, `BUNDLE` or `FOLDED`.
        version: the expected version of the format.
        well_formed: returns whether a manifest has the entries of this kind, with the right types. `tensors` must be a
            dict.
    Returns:
        The manifest, and the bytes of the whole file.
    Raises:
        BundleError: the file is missing, cut or edited, or of another kind or format.
    """
    whole = f"a whole, unedited {kind}"
    try:
        if not Path(path).is_file():
            raise FileNotFoundError(None, "no such file")
        data = Path(path).read_bytes()
    except OSError as error:
        raise refusal(path, kind, "a readable file", f"none: {error.strerror}", "Check the path.") from error
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise refusal(path, kind, whole, f"{len(data)} bytes that end before the header does", AGAIN)
    try:
        header = parse_json(data[8 : 8 + length])
        manifest = parse_json(header[METADATA]["manifest"])
        found_version = manifest["format"]
    except (ValueError, LookupError, TypeError) as error:
        found = f"a header without a readable manifest ({shortened(repr(error))})"
        raise refusal(path, kind, whole, found, AGAIN) from error
    found_kind = manifest.get("kind", BUNDLE)
    if found_kind != kind:
        readers = ", ".join(f"{reader} reads a {known}" for known, reader in _READERS.items())
        raise refusal(path, kind, f"a {kind}", f"the kind {quoted(found_kind)}", f"{readers}.")
    if found_version != version:
        advice = f"Use the version that wrote the {kind}."
        raise refusal(path, kind, f"format {version}", f"format {quoted(found_version)}", advice)
    start = data.find(_HASH_START, 8, 8 + length) + len(_HASH_START)
    if manifest.get("payload_sha256") != _hash_but(data, start):
        raise refusal(
            path,
            kind,
            f"the payload hash {quoted(manifest.get('payload_sha256'))} that the manifest states",
            _hash_but(data, start),
            f"The file was cut or edited. {AGAIN}",
        )
    if not well_formed(manifest):
        raise refusal(path, kind, f"a manifest of format {version}", "missing, unknown or ill-typed entries", AGAIN)
    try:
        listed = check_layout(header, len(data) - 8 - length)
    except ValueError as error:
        raise refusal(path, kind, "tensors that fill the file", str(error), AGAIN) from error
    # As text, because in Python 1, 1.0 and True are equal.
    if json.dumps(listed, sort_keys=True) != json.dumps(manifest["tensors"], sort_keys=True):
        raise refusal(path, kind, whole, "other tensors than the manifest lists", AGAIN)
    return manifest, data


def tensors_of(path: str | os.PathLike[str], kind: str, data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a file that `read_sealed` has accepted.

    Raises:
        BundleError: a tensor holds NaN or infinity.
    """
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise refusal(path, kind, "tensors", shortened(error), AGAIN) from error
    check_finite(path, kind, tensors)
    return tensors


def check_finite(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that all values are finite.

    Raises:
        BundleError: a tensor holds NaN or infinity.
    """
    name = not_finite(tensors)
    if name is not None:
        raise refusal(
            path,
            kind,
            "finite values",
            f"NaN or infinity in tensor '{shortened(name)}'",
            "A model with such values answers nonsense. Train the task again, for example at a lower rate.",
        )


def describe(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the list of tensors that a manifest holds: name -> `shape` and `dtype`."""
    return {name: {"shape": list(tensor.shape), "dtype": dtype_name(tensor)} for name, tensor in tensors.items()}


def refusal(path: str | os.PathLike[str], kind: str, expected: str, found: str, advice: str) -> BundleError:
    """Return the error for a file that must not be used."""
    return BundleError(f"{kind.capitalize()} '{path}': expected {expected}, found {found}. {advice}")


def _hash_but(data: bytes, start: int) -> str:
    """Return the SHA-256 (hex) of `data`, in which the 64 bytes at `start` count as zeros."""
    view = memoryview(data)
    digest = hashlib.sha256(view[:start])
    digest.update(UNSEALED.encode())
    digest.update(view[start + len(UNSEALED) :])
    return digest.hexdigest()
