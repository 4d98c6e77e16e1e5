"""The method `last_layer`: each task has its own head."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from patches.backbone import Backbone


@dataclass
class LastLayer:
    """Give each task its own head. On InceptionV3 this includes the last layer of the auxiliary branch.

    Source: Mudrakarta et al., "K for the Price of 1", ICLR 2019, arXiv:1810.10703.
    """

    paths: frozenset[str] = field(init=False, default=frozenset())
    """Paths of the heads, which `attach` finds."""

    kind: ClassVar[str] = "selection"
    foldable: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True

    def attach(self, copy: Backbone) -> None:
        self.paths = frozenset(copy.heads())

    def owns(self, key: str, module: nn.Module) -> bool:  # noqa: ARG002
        return key.rpartition(".")[0] in self.paths
