"""The method `scale_bias`: each task has its own normalisation layers."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from patches.backbone import NORM_LAYERS, Backbone
from patches.errors import PatchError
from patches.quoting import quoted


@dataclass
class ScaleBias:
    """Give each task its own normalisation layers: scale γ, bias β, and BatchNorm's running mean and variance.

    Source: Mudrakarta et al., "K for the Price of 1", ICLR 2019, arXiv:1810.10703. The paper has no LayerNorm and no
        GroupNorm (weight and bias, no statistics) and no "source" mode; these are ours.
    """

    statistics: Literal["batch", "source"] = "batch"
    """The statistics that BatchNorm normalises with in training. "batch" takes the batch's mean and variance, which
    also update the running ones, as in the paper. "source" takes the backbone's running ones, which then never
    change."""

    kind: ClassVar[str] = "selection"
    foldable: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.statistics not in ("batch", "source"):
            raise PatchError(
                f"Option statistics={quoted(self.statistics)} of patch method 'scale_bias': use batch or source."
            )

    def attach(self, copy: Backbone) -> None:
        if not copy.norm_layers():
            raise PatchError(
                f"Patch method 'scale_bias' needs normalisation layers, and backbone '{copy.name}' has none. "
                "Use 'last_layer', or add the layer's type to NORM_LAYERS in patches/backbone.py."
            )
        if self.statistics == "source":
            if not copy.batch_norms():
                raise PatchError(
                    f"Option statistics='source' is about BatchNorm layers, and backbone '{copy.name}' has none. "
                    "Leave the option out."
                )
            for norm in copy.batch_norms().values():
                norm.frozen = True  # type: ignore[assignment]

    def owns(self, key: str, module: nn.Module) -> bool:  # noqa: ARG002
        return isinstance(module, NORM_LAYERS)
