"""Bundles. A bundle is the file that carries one task's patch: a sealed file (`patches/sealed.py`)."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from patches.backbone import Backbone, is_identity
from patches.errors import BundleError, PatchError
from patches.families import FAMILIES
from patches.methods.mist import Edge
from patches.model import PatchedModel
from patches.patch import attach, outline
from patches.quoting import quoted, shortened
from patches.sealed import BUNDLE, read_sealed, refusal, tensors_of, write_sealed

FORMAT = 1
"""Version of the file format."""


@dataclass(frozen=True)
class BundleInfo:
    """The contents of a bundle's manifest."""

    payload_sha256: str
    """SHA-256 (hex) of the whole file, in which these digits count as zeros."""
    format: int
    """Version of the file format."""
    method: str
    """Name of the patch method, or several joined with "+"."""
    options: dict[str, Any]
    """Every option of the method with its value."""
    num_classes: int
    """Number of outputs of the head."""
    head: str
    """Who holds the head: "shared", "private" or "fixed"."""
    fixed_head: dict[str, Any] | None
    """The `seed` and the `sha256` of a fixed random head, whose values are not in the file, or None."""
    classes: list[str]
    """A name for each output, in order."""
    preprocessing: dict[str, Any]
    """How an image becomes the network's input."""
    metrics: dict[str, Any]
    """Values that were measured with this patch."""
    backbone: dict[str, Any]
    """`name`, `options` and `content_hash` of the one backbone that the bundle fits."""
    tensors: dict[str, Any]
    """Tensor name -> `shape` and `dtype`."""


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("payload_sha256", "method", "head"), (str,)),
    **dict.fromkeys(("format", "num_classes"), (int,)),
    **dict.fromkeys(("options", "preprocessing", "metrics", "backbone", "tensors"), (dict,)),
    "classes": (list,),
    "fixed_head": (dict, type(None)),
}


def save_bundle(
    model: PatchedModel | Edge,
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str],
    preprocessing: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
) -> BundleInfo:
    """Write a model's private tensors, bit for bit, and a manifest of what is needed to use them again.

    The file is written atomically.

    Args:
        model: a task's model, or MIST's edge network alone.
        path: the file to write.
        classes: a name for each output, in order.
        preprocessing: how an image becomes the network's input, as `Preprocessing.as_json` returns it, which
            `PatchBank.predict` and cascades need. Without them anything that JSON can hold will do.
        metrics: values that were measured with this patch. JSON must be able to hold them.
    Returns:
        The manifest that was written.
    Raises:
        BundleError: the number of class names is not that of the outputs, JSON cannot hold a value, a private tensor
            holds NaN or infinity, or the shared tensors are no longer equal to the backbone's.
        OSError: the folder cannot be written, or the disk is full.
    """
    if len(classes) != model.num_classes or not all(isinstance(name, str) for name in classes):
        raise BundleError(
            f"Bundle '{path}': expected {model.num_classes} class names (strings), one for each output, "
            f"found {len(classes)}. Pass classes=[...] in the order of the labels."
        )
    if isinstance(model, PatchedModel):
        _check_shared(path, model)
    manifest = {
        "format": FORMAT,
        "method": model.method,
        "options": model.options,
        "num_classes": model.num_classes,
        "head": model.head,
        "fixed_head": model.fixed_head,
        "classes": list(classes),
        "preprocessing": dict(preprocessing),
        "metrics": dict(metrics or {}),
        "backbone": model.backbone.identity() if isinstance(model, PatchedModel) else model.backbone,
    }
    return BundleInfo(**write_sealed(path, BUNDLE, manifest, model.private_state()))


def inspect_bundle(path: str | os.PathLike[str]) -> BundleInfo:
    """Read a bundle's manifest and check the payload hash. This needs no backbone and builds no model.

    Raises:
        BundleError: the file is missing, cut or edited, or has a format that this version does not know.
    """
    return _read(path)[0]


def load_bundle(path: str | os.PathLike[str], backbone: Backbone) -> PatchedModel:
    """Attach a bundle's patch to the backbone that the bundle fits.

    The backbone is never changed. Memory for the patch is taken only after its tensors have turned out to be those that
    the method and its options make on this backbone.

    Returns:
        A new model in eval mode.
    Raises:
        BundleError: `inspect_bundle` refuses the file, the backbone is another one, or the tensors do not fit or hold
            values that are not finite.
    """
    info, data = _read(path)
    _check_backbone(path, info, backbone)
    classes = None if info.head == "shared" else info.num_classes
    seed = info.fixed_head["seed"] if info.fixed_head else 0
    tensors = tensors_of(path, BUNDLE, data)
    try:
        fitting = outline(backbone, info.method, classes, **info.options)
        fitting.check_private_state(tensors)
        if json.dumps({**fitting.options, **info.options}) != json.dumps(fitting.options):
            raise ValueError("options that the method replaces by others")
        model = attach(backbone, info.method, classes, seed=seed, **info.options)
        model.load_private_state(tensors)
    except (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError) as error:
        raise _refusal(
            path,
            f"a patch of method '{shortened(info.method)}' that fits backbone '{backbone.name}'",
            f"one that does not: {_reason(error)}",
            "Export the bundle again with this version.",
        ) from error
    if (model.head, model.fixed_head, model.num_classes) != (info.head, info.fixed_head, info.num_classes):
        raise _refusal(
            path,
            f"a {shortened(info.head)} head {shortened(info.fixed_head or '')} with {info.num_classes} outputs",
            f"a {model.head} head {model.fixed_head or ''} with {model.num_classes} outputs",
            "The seed draws other values here: use the torch version that wrote the bundle, or export with a private "
            "head ('+last_layer').",
        )
    model.classes = tuple(info.classes)
    model.preprocessing = info.preprocessing
    return model


def verify_bundle(path: str | os.PathLike[str], backbone: Backbone) -> BundleInfo:
    """Check everything that `load_bundle` checks, and return the manifest.

    Raises:
        BundleError: the bundle cannot be loaded. See `load_bundle`.
    """
    load_bundle(path, backbone)
    return inspect_bundle(path)


def _check_shared(path: str | os.PathLike[str], model: PatchedModel) -> None:
    base = model.backbone.network.state_dict()
    for name, tensor in model.shared_state().items():
        if tensor.data_ptr() != base[name].data_ptr() and not torch.equal(tensor, base[name]):
            raise BundleError(
                f"Bundle '{path}': expected shared tensor '{name}' to be the backbone's, found other values. "
                "Write the trained shared tensors into the backbone before saving bundles."
            )


def _read(path: str | os.PathLike[str]) -> tuple[BundleInfo, bytes]:
    """Return the manifest and the bytes of the whole file."""
    manifest, data = read_sealed(path, BUNDLE, FORMAT, _well_formed)
    return BundleInfo(**manifest), data


def _well_formed(manifest: dict[str, Any]) -> bool:
    if set(manifest) != {field.name for field in fields(BundleInfo)}:
        return False
    # Not `isinstance`, because a switch (True) is no whole number here.
    if not all(type(manifest[key]) in kinds for key, kinds in _TYPES.items()):
        return False
    return (
        is_identity(manifest["backbone"])
        and _is_fixed_head(manifest["fixed_head"])
        and len(manifest["classes"]) == manifest["num_classes"]
        and all(isinstance(name, str) for name in manifest["classes"])
    )


def _is_fixed_head(head: dict[str, Any] | None) -> bool:
    """Return whether a manifest's entry describes a fixed head, or none."""
    match head:
        case {"seed": seed, "sha256": str(), **rest}:
            return not rest and type(seed) is int
    return head is None


def _check_backbone(path: str | os.PathLike[str], info: BundleInfo, backbone: Backbone) -> None:
    expected, found = info.backbone, backbone.architecture()
    # A bundle from before its architecture had some option was made with that option's default.
    expected = {**expected, "options": {**FAMILIES[backbone.name].options, **expected["options"]}}
    if expected["name"] != found["name"]:
        raise _refusal(
            path,
            f"backbone '{shortened(expected['name'])}'",
            f"'{found['name']}'",
            "Load the backbone the bundle names.",
        )
    for key in sorted(expected["options"].keys() | found["options"].keys()):
        wanted, given = expected["options"].get(key, "no such option"), found["options"].get(key, "no such option")
        if wanted != given:
            raise _refusal(
                path,
                f"backbone '{backbone.name}' with {shortened(key)}={quoted(wanted)}",
                f"{shortened(key)}={quoted(given)}",
                "Build it with load_backbone(name, weights=file, **options), the options as inspect_bundle shows them.",
            )
    content_hash = backbone.content_hash()
    if expected["content_hash"] != content_hash:
        raise _refusal(
            path,
            f"a backbone with content hash {shortened(expected['content_hash'])}",
            content_hash,
            "Load the weights file that was exported with the bundle.",
        )


def _reason(error: Exception) -> str:
    """Return an error's message: this package's own one, or the beginning of another one."""
    return str(error) if isinstance(error, PatchError) else shortened(error)


def _refusal(path: str | os.PathLike[str], expected: str, found: str, advice: str) -> BundleError:
    return refusal(path, BUNDLE, expected, found, advice)
