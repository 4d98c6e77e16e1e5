"""Attach a patch: decide which tensors are private, and make the task's model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from patches.backbone import Backbone
from patches.errors import PatchError
from patches.layers import FixedLinear, PatchedBatchNorm2d, draw_linear
from patches.method import MethodInfo, Patch
from patches.methods import METHODS
from patches.model import HeadOwner, ParameterCounts, PatchedModel
from patches.names import unknown_name_message
from patches.options import declared_options, option_values
from patches.quoting import quoted
from patches.side import SIDE_SEEDS, side_of
from patches.side_model import SideModel
from patches.structure import alias, copy_structure, meta, seeded

__all__ = ["ParameterCounts", "PatchedModel", "attach", "methods"]

DrawHead = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
"""Draws a head: takes (inputs, outputs, generator), returns the weight (outputs, inputs) and the bias (outputs,)."""


def methods() -> dict[str, MethodInfo]:
    """Return every patch method by name. `attach` takes these names, alone or joined with "+"."""
    return {
        name: MethodInfo(kind=method.kind, foldable=method.foldable, identity_at_start=method.identity_at_start)
        for name, method in METHODS.items()
    }


def attach(
    backbone: Backbone, method: str, num_classes: int | None = None, *, seed: int = 0, **options: Any
) -> PatchedModel:
    """Make a task's model on a backbone. It starts from the backbone's values and aliases its shared tensors.

    Args:
        backbone: the backbone. Its weights, dtype and device must not change any more.
        method: one or more names from `methods()`, joined with "+" ("scale_bias+last_layer").
        num_classes: None keeps the backbone's own head, which is copied if the method owns the head and shared
            otherwise. A number makes a new random head. It is private if the method owns the head. Otherwise it is
            fixed: frozen, and outside the state dict.
        seed: seed of the new head and of a side network. Both are drawn on the CPU, and the global random state stays
            as it was.
        options: options of the methods. Each one goes to the method that declares it.
    Raises:
        PatchError: a method or option is unknown, or a method finds nothing to own in this backbone.
    """
    parts = _make_parts(method, options)
    if num_classes is not None and num_classes < 1:
        raise PatchError(f"num_classes={num_classes}, but a head needs 1 or more. Leave it out to use the backbone's.")
    classes = num_classes or backbone.options["num_classes"]
    copy = Backbone(backbone.name, {**backbone.options, "num_classes": classes}, _aliasing_copy(backbone))
    with seeded(seed + SIDE_SEEDS):
        for part in parts:
            part.attach(copy)
    model_class, draw_head = _model_class(copy, parts)
    private = _private_names(copy, parts)
    head: HeadOwner = "private" if any(f"{path}.weight" in private for path in copy.heads()) else "shared"
    if num_classes is not None:
        head = "private" if head == "private" else "fixed"
        _replace_heads(copy, num_classes, draw_head, torch.Generator().manual_seed(seed), fixed=head == "fixed")
    _give_own_storage(copy.network, private)
    return model_class(
        backbone,
        copy.network,
        method=method,
        options={name: value for part in parts for name, value in option_values(part).items()},
        num_classes=classes,
        head=head,
        seed=seed,
        private_names=private,
    )


def outline(backbone: Backbone, method: str, num_classes: int | None = None, **options: Any) -> PatchedModel:
    """Attach a patch without values: every tensor has its name, shape and dtype, and lies on torch's meta device.

    It takes no memory, whatever size the options ask for.

    Args:
        backbone, method, num_classes, options: as for `attach`. The backbone stays as it is.
    Raises:
        PatchError: as for `attach`.
    """
    hollow = Backbone(backbone.name, backbone.options, copy_structure(backbone.network, meta))
    with torch.device("meta"):
        return attach(hollow, method, num_classes, **options)


def _make_parts(method: str, options: dict[str, Any]) -> list[Patch]:
    """Return the methods whose names are joined in `method`, each with the options that it declares."""
    names = method.split("+")
    for name in names:
        if name not in METHODS:
            raise PatchError(unknown_name_message("patch method", name, METHODS))
        if names.count(name) > 1:
            raise PatchError(f"Patch method {quoted(method)} names '{name}' twice. Name each method once.")
    declared = {name: declared_options(METHODS[name]) for name in names}
    for option in options:
        claimants = [name for name in names if option in declared[name]]
        if not claimants:
            allowed = [known for known_options in declared.values() for known in known_options]
            raise PatchError(unknown_name_message(f"option of patch method '{method}'", option, allowed))
        if len(claimants) > 1:
            raise PatchError(
                f"Option '{option}' of patch method '{method}' is declared by {' and '.join(claimants)}. "
                "Attach methods that share no option name."
            )
    for name in names:
        if METHODS[name].kind == "side" and len(names) > 1:
            raise PatchError(
                f"Patch method '{method}' joins '{name}' with others, but a side network stands on a frozen backbone "
                f"and owns its head already. Attach '{name}' alone."
            )
    return [METHODS[name](**{key: options[key] for key in declared[name] if key in options}) for name in names]


def _aliasing_copy(backbone: Backbone) -> nn.Module:
    """Return a copy of the network's structure over the same storage. Its BatchNorm layers can be frozen."""
    network = copy_structure(backbone.network, alias)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.__class__ = PatchedBatchNorm2d  # this keeps the data and replaces `train()` only
    return network


def _model_class(copy: Backbone, parts: list[Patch]) -> tuple[type[PatchedModel], DrawHead]:
    """Return the model's class and the function that draws a fresh head.

    This is the one place that tells a model with a side network from a model whose network runs by itself.
    """
    if any(part.kind == "side" for part in parts):
        return SideModel, side_of(copy.network).draw_head
    return PatchedModel, draw_linear


def _private_names(copy: Backbone, parts: list[Patch]) -> frozenset[str]:
    """Return the state-dict names of the tensors that at least one of the methods owns."""
    modules = dict(copy.network.named_modules())
    return frozenset(
        key
        for key in copy.network.state_dict()
        if any(part.owns(key, modules[key.rpartition(".")[0]]) for part in parts)
    )


def _replace_heads(
    copy: Backbone, num_classes: int, draw_head: DrawHead, generator: torch.Generator, fixed: bool
) -> None:
    """Replace the heads by fresh ones of `num_classes` outputs. All are drawn in order from one generator."""
    for path, old in copy.heads().items():
        weight, bias = (tensor.to(old.weight) for tensor in draw_head(old.in_features, num_classes, generator))
        layer = FixedLinear(weight, bias) if fixed else nn.Linear(old.in_features, num_classes, device="meta")
        if not fixed:
            layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        copy.network.set_submodule(path, layer)
    if hasattr(copy.network, "num_classes"):
        copy.network.num_classes = num_classes  # type: ignore[assignment]


def _give_own_storage(network: nn.Module, private: frozenset[str]) -> None:
    """Replace the private tensors, which alias the backbone's so far, by copies of their values."""
    for key in private:
        path, _, name = key.rpartition(".")
        module = network.get_submodule(path)
        own = getattr(module, name).detach().clone()
        setattr(module, name, nn.Parameter(own) if name in module._parameters else own)
