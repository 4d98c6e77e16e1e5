"""Cascades on disk: as JSON alone, or as a package together with its backbone and bundles.

A package is an uncompressed zip file with `cascade.json`, `backbone.safetensors`, and `bundles/MODEL.patch` for each
model that a stage uses. Reading a package never unpickles anything.
"""

import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from multitask.cascade.cascade import Cascade, OperatingPoint
from multitask.cascade.costs import Costs, View
from multitask.cascade.errors import CascadeError
from multitask.cascade.greedy import Stage
from multitask.cascade.rules import SCORES, Rule
from patches.backbone import load_backbone
from patches.bundle import inspect_bundle, load_bundle
from patches.files import atomic_file, write_atomic
from patches.patch import PatchedModel

FORMAT = 1
"""Version of the JSON."""
MANIFEST, BACKBONE = "cascade.json", "backbone.safetensors"
"""Names of files in a package."""


def save_cascade(cascade: Cascade, path: str | os.PathLike[str]) -> None:
    """Write the cascade alone as JSON, atomically. This is for models without bundles."""
    write_atomic(path, _text(_described(cascade)))


def save_package(cascade: Cascade, path: str | os.PathLike[str], export: str | os.PathLike[str]) -> None:
    """Write the cascade with its backbone and bundles as one file, atomically.

    Args:
        cascade: the cascade.
        path: the package to write.
        export: folder with backbone.safetensors and a .patch file for each model of the cascade.
    Raises:
        CascadeError: a file is missing in the folder.
        patches.BundleError: a bundle is damaged.
        DiskFullError: the disk is full.
    """
    folder = Path(export)
    bundles = {model: folder / f"{model}.patch" for model in cascade.models}
    for needed in (folder / BACKBONE, *bundles.values()):
        if not needed.is_file():
            raise CascadeError(f"The package needs '{needed}', which does not exist. Run `multitask export RUN`.")
    infos = {model: inspect_bundle(bundle) for model, bundle in bundles.items()}
    manifest = _described(cascade) | {
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
        CascadeError: the file is neither of the two, or has another format version.
    """
    return _cascade(path, _manifest(path))


def open_package(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> tuple[Cascade, dict[str, PatchedModel], dict[str, View]]:
    """Load a package.

    Args:
        path: the package.
        device: device for the backbone and the models.
    Returns:
        The cascade, its models on one backbone, and the view of each model.
    Raises:
        CascadeError: the file is not a package, or its backbone or a bundle is not the one that was saved with it.
        patches.BundleError: a bundle is damaged or does not fit the backbone.
    """
    manifest = _manifest(path)
    cascade = _cascade(path, manifest)
    if "bundles" not in manifest:
        raise CascadeError(
            f"'{path}' holds a cascade without its bundles. Name a package: `multitask cascade fit --export FOLDER "
            "--to FILE.cascade` writes one."
        )
    expected = manifest["backbone"]
    with zipfile.ZipFile(path) as package, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = _extracted(path, package, BACKBONE, folder / BACKBONE)
        backbone = load_backbone(expected["name"], str(weights), **expected["options"]).to(device)
        if backbone.content_hash() != expected["content_hash"]:
            raise _other(path, BACKBONE)
        models, views = {}, {}
        for number, model in enumerate(cascade.models):
            # The file is named by a number, because names inside a package must not decide where files are written.
            bundle = _extracted(path, package, _member(model), folder / f"{number}.patch")
            info = inspect_bundle(bundle)
            if info.payload_sha256 != manifest["bundles"].get(model):
                raise _other(path, _member(model))
            models[model] = load_bundle(bundle, backbone)
            views[model] = View.of(info.preprocessing)
    return cascade, models, views


def _described(cascade: Cascade) -> dict[str, Any]:
    """Return the cascade in the form of its JSON."""
    return {
        "format": FORMAT,
        "reference": cascade.reference,
        "slack": cascade.slack,
        "asked": cascade.asked,
        "points": [
            {
                "relative_accuracy": point.relative_accuracy,
                "accuracy": point.accuracy,
                "mean_cost": point.mean_cost,
                "stages": [asdict(stage) for stage in point.stages],
            }
            for point in cascade.points
        ],
        "costs": _plain_costs(cascade.costs),
        "latency": None if cascade.latency is None else _plain_costs(cascade.latency),
        "fitted_on": list(cascade.fitted_on),
    }


def _plain_costs(costs: Costs) -> dict[str, Any]:
    """Return costs in the form of the JSON, which has no pairs as keys."""
    shared = [[one, other, cost] for (one, other), cost in costs.shared.items()]
    return {"unit": costs.unit, "alone": dict(costs.alone), "shared": shared}


def _cascade(path: str | os.PathLike[str], manifest: Mapping[str, Any]) -> Cascade:
    """Return the cascade that a JSON describes.

    Raises:
        CascadeError: the JSON is incomplete, or its stages contradict each other.
    """
    try:
        cascade = Cascade(
            points=tuple(
                OperatingPoint(point["relative_accuracy"], tuple(map(_stage, point["stages"])))
                for point in manifest["points"]
            ),
            asked=manifest["asked"],
            reference=manifest["reference"],
            costs=_costs(manifest["costs"]),
            slack=manifest["slack"],
            latency=None if manifest["latency"] is None else _costs(manifest["latency"]),
            fitted_on=tuple(manifest["fitted_on"]),
        )
        cascade.points[cascade.asked].stages[0]  # raises IndexError if there is none
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise CascadeError(f"'{path}': found no whole cascade ({error!r}). Fit the cascade again.") from error
    for point in cascade.points:
        for number, stage in enumerate(point.stages):
            if (stage.threshold is None) != (number == len(point.stages) - 1) or stage.rule.score not in SCORES:
                raise CascadeError(
                    f"'{path}': stage {number} of a point has rule '{stage.rule.score}' and threshold "
                    f"{stage.threshold}, but the last stage, and it alone, has no threshold, and the rules are "
                    f"{', '.join(SCORES)}. Fit the cascade again."
                )
    return cascade


def _stage(found: dict[str, Any]) -> Stage:
    """Return the stage that a part of the JSON describes."""
    rule = Rule(**found["rule"] | {"weights": tuple(found["rule"]["weights"])})
    return Stage(**found | {"rule": rule})


def _costs(found: dict[str, Any]) -> Costs:
    """Return the costs that a part of the JSON describes."""
    return Costs(found["unit"], found["alone"], {(one, other): cost for one, other, cost in found["shared"]})


def _manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the JSON of a cascade or of a package.

    Raises:
        CascadeError: the file is neither of the two, or has another format version.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as package:
                data = package.read(MANIFEST)
        else:
            data = Path(path).read_bytes()
        manifest = json.loads(data)
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise CascadeError(
            f"'{path}': expected a cascade (JSON) or a package with one, found neither ({error}). Name a file that "
            "`multitask cascade fit` wrote."
        ) from error
    if version != FORMAT:
        raise CascadeError(
            f"'{path}': expected format {FORMAT}, found {version!r}. Use the version of this program that wrote it."
        )
    return manifest


def _extracted(path: str | os.PathLike[str], package: zipfile.ZipFile, member: str, to: Path) -> Path:
    """Write one file of a package to `to`, and return that path.

    Raises:
        CascadeError: the package does not contain the file, or it is damaged.
    """
    try:
        to.write_bytes(package.read(member))
    except (KeyError, zipfile.BadZipFile) as error:
        raise CascadeError(
            f"'{path}': found no whole '{member}' in it ({error}). Copy the package again, or write it anew."
        ) from error
    return to


def _other(path: str | os.PathLike[str], member: str) -> CascadeError:
    """Return the error for a backbone or bundle with another hash than the cascade names."""
    return CascadeError(
        f"'{path}': '{member}' is not the one that the cascade was saved with (its hash differs). Copy the package "
        "again, or write it anew."
    )


def _member(model: str) -> str:
    """Return the name of a model's bundle in a package."""
    return f"bundles/{model}.patch"


def _text(content: dict[str, Any]) -> bytes:
    """Return JSON as bytes. Values that JSON does not allow, such as NaN, raise ValueError."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
