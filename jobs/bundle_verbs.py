"""`multitask bundle`: look at a bundle, check it, and fold it into a plain network."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.groups import Group

if TYPE_CHECKING:
    from patches import Backbone, BundleInfo

app = typer.Typer(cls=Group, help="Look at, check and fold patch bundles.", no_args_is_help=True)

Bundle = Annotated[Path, typer.Argument(help="A .patch file.")]
Weights = Annotated[
    Path, typer.Option("--backbone", help="The file backbone.safetensors that was exported with the bundle.")
]
NAMED = 60
"""Number of characters of class names that `inspect` shows."""


@app.command()
def inspect(
    bundle: Bundle,
    tensors: Annotated[bool, typer.Option("--tensors", help="List name, shape and dtype of every tensor too.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the whole manifest as JSON.")] = False,
) -> None:
    """Show what a bundle holds, without building a model."""
    import patches
    from patches.quoting import shortened

    info = patches.inspect_bundle(bundle)
    if json_output:
        print(json.dumps(asdict(info)))
        return
    print(bundle)
    for name, value in _facts(info).items():
        print(f"{name:<14} {value}")
    if tensors:
        names = [shortened(name) for name in info.tensors]
        width = max(map(len, names), default=0)
        for name, tensor in zip(names, info.tensors.values(), strict=True):
            print(f"{name:<{width}}  {tensor['dtype']:<8} {tensor['shape']}")


@app.command()
def verify(bundle: Bundle, backbone: Weights) -> None:
    """Check that a bundle is intact and fits the backbone; the exit status is 1 if it is not or does not."""
    import patches

    patches.verify_bundle(bundle, _backbone_of(bundle, backbone))
    print(f"{bundle} is intact and fits {backbone}")


@app.command()
def fold(
    bundle: Bundle,
    backbone: Weights,
    to: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Fold a bundle into a plain network with the same outputs, and write it as a file for `patches.load_folded`."""
    import patches
    from patches.folded import check_ending

    check_ending(to)
    if to.exists() and to.samefile(backbone):
        raise patches.BundleError(f"'{to}' is the backbone's own file. Give another name to the folded network.")
    patches.save_folded(bundle, _backbone_of(bundle, backbone), to)
    print(f"{to}: the folded network, {to.stat().st_size:,} bytes. In Python: patches.load_folded({str(to)!r})")


def _backbone_of(bundle: Path, weights: Path) -> "Backbone":
    import patches

    architecture = patches.inspect_bundle(bundle).backbone
    return patches.load_backbone(architecture["name"], weights, **architecture["options"])


def _facts(info: "BundleInfo") -> dict[str, str]:
    """Return what `inspect` shows, line by line."""
    import torch

    from patches.quoting import shortened

    sizes = [math.prod(tensor["shape"]) for tensor in info.tensors.values()]
    dtypes = [getattr(torch, tensor["dtype"]) for tensor in info.tensors.values()]
    size_bytes = sum(size * dtype.itemsize for size, dtype in zip(sizes, dtypes, strict=True))
    seed = "" if info.fixed_head is None else f", drawn from seed {info.fixed_head['seed']}"
    facts = {
        "method": info.method,
        "options": _listed(info.options),
        "classes": _first_names(info.classes),
        "head": f"{info.head}{seed}",
        "backbone": _backbone(info.backbone),
        "backbone hash": info.backbone["content_hash"],
        "preprocessing": _listed(info.preprocessing),
        "metrics": _listed(info.metrics),
        "tensors": f"{len(sizes)} with {sum(sizes):,} values, {size_bytes:,} bytes",
        "format": str(info.format),
        "payload hash": info.payload_sha256,
    }
    return {name: shortened(value, 1000) for name, value in facts.items()}


def _first_names(classes: Sequence[str]) -> str:
    """Return the number of classes and the first few of their names."""
    from patches.quoting import shortened

    shown = [shortened(classes[0], 100)] if classes else []
    for name in classes[1:]:
        if len(", ".join([*shown, name])) > NAMED:
            break
        shown.append(name)
    more = len(classes) - len(shown)
    return f"{len(classes)}: {', '.join(shown)}{f' and {more} more' if more else ''}"


def _backbone(identity: Mapping[str, Any]) -> str:
    """Return the name of a backbone, and its options as far as they are not the defaults of its architecture."""
    from patches.families import FAMILIES

    name, options = identity["name"], identity["options"]
    defaults = {**FAMILIES[name].options, "norm_momentum": None} if name in FAMILIES else {}
    own = {key: value for key, value in options.items() if key not in defaults or value != defaults[key]}
    return f"{name}, {_listed(own)}"


def _listed(values: Mapping[str, Any]) -> str:
    """Return names and values in one line, such as "resolution 28, mean [0.5, 0.5, 0.5]"."""
    texts = (
        f"{value:.6g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
        for value in values.values()
    )
    return ", ".join(f"{key} {text}" for key, text in zip(values, texts, strict=True)) or "none"
