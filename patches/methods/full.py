"""A private network."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from patches.backbone import Backbone


@dataclass
class Full:
    """Give the task every tensor: an independent network that starts from the backbone's values."""

    kind: ClassVar[str] = "selection"
    foldable: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True

    def attach(self, copy: Backbone) -> None:
        """Nothing to change."""

    def owns(self, key: str, module: nn.Module) -> bool:  # noqa: ARG002
        return True
