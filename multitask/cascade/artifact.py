"""Cascades on disk: as JSON alone, or as a package together with its backbone and bundles.

A package is an uncompressed zip file with `cascade.json`, `backbone.safetensors`, and `bundles/MODEL.patch` for each
model that a stage uses. Reading a package never unpickles anything.
"""

import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from multitask.cascade.cascade import Cascade
from multitask.cascade.classes import common_classes
from multitask.cascade.document import FORMAT, Document, describe, understand
from multitask.cascade.errors import CascadeError
from patches.backbone import load_backbone
from patches.bundle import inspect_bundle, load_bundle
from patches.errors import PatchError
from patches.files import atomic_file, write_atomic
from patches.images.preprocessing import Preprocessing
from patches.patch import PatchedModel
from patches.quoting import quoted, shortened
from patches.strict_json import parse_json
from patches.zips import ZipError, is_zip, open_stored, read_member

MANIFEST, BACKBONE = "cascade.json", "backbone.safetensors"
"""Names of files in a package."""


def save_cascade(cascade: Cascade, path: str | os.PathLike[str]) -> None:
    """Write the cascade alone as JSON, atomically. This is for models without bundles."""
    write_atomic(path, _text(describe(cascade)))


def save_package(cascade: Cascade, path: str | os.PathLike[str], export: str | os.PathLike[str]) -> None:
    """Write the cascade with its backbone and bundles as one file, atomically.

    Args:
        cascade: the cascade.
        path: the package to write.
        export: folder with backbone.safetensors and a .patch file for each model of the cascade.
    Raises:
        CascadeError: a file is missing in the folder, or the bundles have different classes.
        patches.BundleError: a bundle is damaged.
        DiskFullError: the disk is full.
    """
    folder = Path(export)
    bundles = {model: folder / f"{model}.patch" for model in cascade.models}
    for needed in (folder / BACKBONE, *bundles.values()):
        if not needed.is_file():
            raise CascadeError(f"The package needs '{needed}', which does not exist. Run `multitask export RUN`.")
    infos = {model: inspect_bundle(bundle) for model, bundle in bundles.items()}
    common_classes({model: info.classes for model, info in infos.items()})
    manifest = describe(cascade) | {
        "backbone": next(iter(infos.values())).backbone,
        "bundles": {model: info.payload_sha256 for model, info in infos.items()},
    }
    size_bytes = sum(needed.stat().st_size for needed in (folder / BACKBONE, *bundles.values()))
    with atomic_file(path, size_bytes) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as package:
        package.writestr(MANIFEST, _text(manifest))
        package.write(folder / BACKBONE, BACKBONE)
        for model, bundle in bundles.items():
            package.write(bundle, _member(model))


def load_cascade(path: str | os.PathLike[str]) -> Cascade:
    """Read a cascade from its JSON or from a package. The bundles in a package are not opened.

    Raises:
        CascadeError: the file is neither of the two, is damaged, or has another format version.
    """
    return _read(path)[1]


def open_package(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> tuple[Cascade, dict[str, PatchedModel], dict[str, Preprocessing]]:
    """Load a package.

    Args:
        path: the package.
        device: device for the backbone and the models.
    Returns:
        The cascade, its models on one backbone, and the preprocessing of each model.
    Raises:
        CascadeError: the file is not a package or is damaged, its backbone or a bundle is not the one that was saved
            with it, or its models answer different questions.
        patches.BackboneError: the backbone cannot be built from its weights.
        patches.BundleError: a bundle is damaged or does not fit the backbone.
    """
    document, cascade = _read(path)
    identity, hashes = document.backbone, document.bundles
    if identity is None or hashes is None or not is_zip(path):
        raise CascadeError(
            f"'{path}' holds a cascade without its bundles. Name a package: `multitask cascade fit --export FOLDER "
            "--to FILE.cascade` writes one."
        )
    with tempfile.TemporaryDirectory() as name:
        weights, bundles = _extracted(path, cascade.models, Path(name))
        backbone = load_backbone(identity["name"], str(weights), **identity["options"]).to(device)
        if backbone.content_hash() != identity["content_hash"]:
            raise _other(path, BACKBONE)
        models, views, classes = {}, {}, {}
        for model, bundle in bundles.items():
            info = inspect_bundle(bundle)
            if info.payload_sha256 != hashes.get(model):
                raise _other(path, _member(model))
            models[model] = load_bundle(bundle, backbone)
            views[model] = _preprocessing(path, model, info.preprocessing)
            classes[model] = info.classes
    try:
        common_classes(classes)
    except CascadeError as error:
        raise CascadeError(f"'{path}': {error}") from None
    return cascade, models, views


def _read(path: str | os.PathLike[str]) -> tuple[Document, Cascade]:
    """Read and check the JSON of a cascade or of a package.

    Raises:
        CascadeError: the file is neither of the two, is damaged, or has another format version.
    """
    try:
        if is_zip(path):
            with open_stored(path) as package:
                data = read_member(package, MANIFEST)
        else:
            data = Path(path).read_bytes()
        content = parse_json(data)
        version = content["format"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CascadeError(
            f"'{path}': expected a cascade (JSON) or a package with one, found neither ({shortened(error)}). Name a "
            "file that `multitask cascade fit` wrote."
        ) from error
    if version != FORMAT:
        raise CascadeError(
            f"'{path}': expected format {FORMAT}, found {quoted(version)}. Use the version of this program that wrote "
            "it."
        )
    try:
        document = understand(content)
        return document, document.cascade()
    except CascadeError as error:
        raise CascadeError(f"'{path}': found no whole cascade ({error}). Fit the cascade again.") from error


def _extracted(path: str | os.PathLike[str], models: tuple[str, ...], folder: Path) -> tuple[Path, dict[str, Path]]:
    """Write the files of a package to a folder, under names that the package does not decide.

    Returns:
        The backbone's weights, and model -> its bundle.
    Raises:
        CascadeError: the package does not contain a file, or it is damaged.
    """
    wanted = {BACKBONE: folder / BACKBONE}
    wanted |= {_member(model): folder / f"{number}.patch" for number, model in enumerate(models)}
    try:
        with open_stored(path) as package:
            for member, to in wanted.items():
                to.write_bytes(read_member(package, member))
    except ZipError as error:
        raise CascadeError(f"'{path}': found {error}. Copy the package again, or write it anew.") from error
    return wanted[BACKBONE], {model: wanted[_member(model)] for model in models}


def _preprocessing(path: str | os.PathLike[str], model: str, content: Mapping[str, Any]) -> Preprocessing:
    try:
        return Preprocessing.from_json(content)
    except PatchError as error:
        raise CascadeError(
            f"'{path}': the bundle of model '{shortened(model)}' has no usable preprocessing ({shortened(error)}). "
            "Export the bundles again."
        ) from error


def _other(path: str | os.PathLike[str], member: str) -> CascadeError:
    """Return the error for a backbone or bundle with another hash than the cascade names."""
    return CascadeError(
        f"'{path}': {quoted(member)} is not the one that the cascade was saved with (its hash differs). Copy the "
        "package again, or write it anew."
    )


def _member(model: str) -> str:
    """Return the name of a model's bundle in a package."""
    return f"bundles/{model}.patch"


def _text(content: dict[str, Any]) -> bytes:
    """Return JSON as bytes. Values that JSON does not allow, such as NaN, raise ValueError."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
