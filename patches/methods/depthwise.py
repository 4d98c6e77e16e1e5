"""The method `depthwise`: each task has its own depthwise kernels."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from patches.backbone import Backbone
from patches.errors import PatchError


@dataclass
class Depthwise:
    """Give each task its own depthwise convolution kernels. BatchNorm stays shared.

    Source: Mudrakarta et al., "K for the Price of 1", ICLR 2019, arXiv:1810.10703.
    """

    paths: frozenset[str] = field(init=False, default=frozenset())
    """Paths of the depthwise convolutions, which `attach` finds."""

    kind: ClassVar[str] = "selection"
    foldable: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True

    def attach(self, copy: Backbone) -> None:
        self.paths = frozenset(copy.depthwise_layers())
        if not self.paths:
            raise PatchError(
                f"Patch method 'depthwise' needs depthwise convolutions, and backbone '{copy.name}' has none. "
                "Use backbone 'mobilenet_v2', or patch method 'scale_bias'."
            )

    def owns(self, key: str, module: nn.Module) -> bool:  # noqa: ARG002
        return key.rpartition(".")[0] in self.paths
