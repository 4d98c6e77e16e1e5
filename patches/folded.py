"""Files of folded networks. Such a file is a sealed file (`patches/sealed.py`) with all tensors of a plain network."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patches.backbone import Backbone, is_architecture, load_backbone
from patches.bundle import inspect_bundle, load_bundle
from patches.errors import BackboneError, BundleError
from patches.fold import fold, merge_norms
from patches.quoting import quoted, shortened
from patches.sealed import FOLDED, describe, read_sealed, refusal, tensors_of, write_sealed

FORMAT = 1
"""Version of the file format."""
ENDING = ".safetensors"
"""Ending of the files' names, by which other programs know that they can read the tensors."""
_TYPES: dict[str, type] = {
    **dict.fromkeys(("payload_sha256", "kind", "bundle_sha256"), str),
    **dict.fromkeys(("architecture", "preprocessing", "tensors"), dict),
    "format": int,
    "classes": list,
}


@dataclass(frozen=True)
class Folded:
    """A plain network of one task, and what is needed to use it."""

    network: nn.Module
    """A network of torchvision's class, in eval mode and on the CPU. Its BatchNorm layers are merged away."""
    classes: tuple[str, ...]
    """A name for each output, in order."""
    preprocessing: dict[str, Any]
    """How an image becomes the network's input, as the bundle says it."""
    bundle_sha256: str
    """The payload hash of the bundle that was folded."""


def save_folded(bundle: str | os.PathLike[str], backbone: Backbone, path: str | os.PathLike[str]) -> None:
    """Fold a bundle into a plain network with the same outputs, and write the network as one file.

    `load_folded` reads the file. Other programs read it as the safetensors file that it is: the network's state dict.

    Args:
        bundle: the bundle.
        backbone: the backbone that the bundle fits.
        path: the file to write. Its name ends in .safetensors.
    Raises:
        BundleError: the name has another ending, or the bundle cannot be loaded (`load_bundle`).
        PatchError: the bundle's method cannot be folded.
        OSError: the folder cannot be written, or the disk is full.
    """
    check_ending(path)
    info = inspect_bundle(bundle)
    architecture = backbone.architecture()
    manifest = {
        "kind": FOLDED,
        "format": FORMAT,
        "architecture": {**architecture, "options": {**architecture["options"], "num_classes": info.num_classes}},
        "classes": info.classes,
        "preprocessing": info.preprocessing,
        "bundle_sha256": info.payload_sha256,
    }
    write_sealed(path, FOLDED, manifest, fold(load_bundle(bundle, backbone)).state_dict())


def check_ending(path: str | os.PathLike[str]) -> None:
    """Check the name of a file that is to be written.

    Raises:
        BundleError: it does not end in .safetensors.
    """
    if Path(path).suffix != ENDING:
        raise BundleError(
            f"The folded network would be written to '{path}', and its file is a safetensors file. Give a name that "
            f"ends in {ENDING}."
        )


def load_folded(path: str | os.PathLike[str]) -> Folded:
    """Load the plain network of a file that `save_folded` or `multitask bundle fold` wrote. No backbone is needed.

    The network is first built without values. Memory is taken only for tensors that the file has.

    Raises:
        BundleError: the file is missing, cut or edited, is no file of a folded network, has a format that this version
            does not know, or holds NaN or infinity.
    """
    manifest, data = read_sealed(path, FOLDED, FORMAT, _well_formed)
    name, options = manifest["architecture"]["name"], manifest["architecture"]["options"]
    tensors = tensors_of(path, FOLDED, data)
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    try:
        with torch.device("meta"):
            network = load_backbone(name, **options).network.to(dtypes.pop() if len(dtypes) == 1 else None)
            merge_norms(network)
    except BackboneError as error:
        raise refusal(path, FOLDED, "a network that this version knows", str(error), "Update this program.") from error
    wanted, listed = describe(network.state_dict()), manifest["tensors"]
    for tensor in sorted(wanted.keys() | listed.keys()):
        if wanted.get(tensor) != listed.get(tensor):
            raise refusal(
                path,
                FOLDED,
                f"{_described(wanted.get(tensor))} as '{shortened(tensor)}' of a folded {name}",
                _described(listed.get(tensor)),
                "Fold the bundle again with this version.",
            )
    network.load_state_dict(tensors, assign=True)
    return Folded(network.eval(), tuple(manifest["classes"]), manifest["preprocessing"], manifest["bundle_sha256"])


def _described(tensor: dict[str, Any] | None) -> str:
    return "no tensor" if tensor is None else f"{quoted(tensor['shape'])} {tensor['dtype']}"


def _well_formed(manifest: dict[str, Any]) -> bool:
    # Not `isinstance`, because a switch (True) is no whole number here.
    return (
        manifest.keys() == _TYPES.keys()
        and all(type(manifest[key]) is kind for key, kind in _TYPES.items())
        and is_architecture(manifest["architecture"])
        and all(isinstance(name, str) for name in manifest["classes"])
        and len(manifest["classes"]) == manifest["architecture"]["options"].get("num_classes")
    )
