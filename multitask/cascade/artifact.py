"""A cascade on disk: JSON alone, or one package with its backbone and bundles.

A package is an uncompressed zip file: `cascade.json`, `backbone.safetensors`, and `bundles/MODEL.patch` for each model
that some stage uses. Nothing in it is ever unpickled.
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
MANIFEST, BACKBONE = "cascade.json", "backbone.safetensors"


def save_cascade(cascade: Cascade, path: str | os.PathLike[str]) -> None:
    """Write the cascade alone as JSON, atomically: for models that are no bundles."""
    write_atomic(path, _text(_described(cascade)))


def save_package(cascade: Cascade, path: str | os.PathLike[str], export: str | os.PathLike[str]) -> None:
    """Write the cascade with its backbone and bundles as one file, atomically.

    Args:
        export: a folder with backbone.safetensors and a .patch file for each of the cascade's models.
    Raises:
        CascadeError: a file is missing.
        patches.BundleError: a bundle is damaged.
    """
    folder = Path(export)
    bundles = {model: folder / f"{model}.patch" for model in cascade.models}
    for needed in (folder / BACKBONE, *bundles.values()):
        if not needed.is_file():
            raise CascadeError(f"'{needed}' is missing, which the package needs. Run `multitask export RUN`.")
    infos = {model: inspect_bundle(bundle) for model, bundle in bundles.items()}
    manifest = _described(cascade) | {
        "backbone": next(iter(infos.values())).backbone,
        "bundles": {model: info.payload_sha256 for model, info in infos.items()},
    }
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as package:
        package.writestr(MANIFEST, _text(manifest))
        package.write(folder / BACKBONE, BACKBONE)
        for model, bundle in bundles.items():
            package.write(bundle, _member(model))


def load_cascade(path: str | os.PathLike[str]) -> Cascade:
    """Read a cascade from its JSON, or from a package, of which no bundle is opened.

    Raises:
        CascadeError: it is neither, or of another format.
    """
    return _cascade(path, _manifest(path))


def open_package(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> tuple[Cascade, dict[str, PatchedModel], dict[str, View]]:
    """The cascade, its models on one backbone, and how each sees an image.

    Raises:
        CascadeError: no package, or a backbone or bundle that is not the one that the cascade was saved with.
        patches.BundleError: a bundle is damaged, or does not fit the backbone.
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
            # Named by numbers here: what a package says must not choose where a file goes.
            bundle = _extracted(path, package, _member(model), folder / f"{number}.patch")
            info = inspect_bundle(bundle)
            if info.payload_sha256 != manifest["bundles"].get(model):
                raise _other(path, _member(model))
            models[model] = load_bundle(bundle, backbone)
            views[model] = View.of(info.preprocessing)
    return cascade, models, views


def _described(cascade: Cascade) -> dict[str, Any]:
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
    shared = [[one, other, cost] for (one, other), cost in costs.shared.items()]
    return {"unit": costs.unit, "alone": dict(costs.alone), "shared": shared}


def _cascade(path: str | os.PathLike[str], manifest: Mapping[str, Any]) -> Cascade:
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
        cascade.points[cascade.asked].stages[0]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise CascadeError(f"'{path}': found no whole cascade ({error!r}). Fit it again.") from error
    for point in cascade.points:
        for number, stage in enumerate(point.stages):
            if (stage.threshold is None) != (number == len(point.stages) - 1) or stage.rule.score not in SCORES:
                raise CascadeError(
                    f"'{path}': stage {number} of a point has rule '{stage.rule.score}' and threshold "
                    f"{stage.threshold}, but the last stage, and it alone, has no threshold, and the rules are "
                    f"{', '.join(SCORES)}. Fit it again."
                )
    return cascade


def _stage(found: dict[str, Any]) -> Stage:
    rule = Rule(**found["rule"] | {"weights": tuple(found["rule"]["weights"])})
    return Stage(**found | {"rule": rule})


def _costs(found: dict[str, Any]) -> Costs:
    return Costs(found["unit"], found["alone"], {(one, other): cost for one, other, cost in found["shared"]})


def _manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
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
    try:
        to.write_bytes(package.read(member))
    except (KeyError, zipfile.BadZipFile) as error:
        raise CascadeError(f"'{path}': found no whole '{member}' in it ({error}). Fetch or write it again.") from error
    return to


def _other(path: str | os.PathLike[str], member: str) -> CascadeError:
    return CascadeError(
        f"'{path}': '{member}' is not the one that the cascade was saved with (other hash). Fetch or write it again."
    )


def _member(model: str) -> str:
    return f"bundles/{model}.patch"


def _text(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
