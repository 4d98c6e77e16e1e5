"""The method `full`: each task has a whole network of its own."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from patches.backbone import Backbone


@dataclass
class Full:
    """Give each task every tensor. The task's network is independent and starts from the backbone's values."""

    kind: ClassVar[str] = "selection"
    foldable: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True

    def attach(self, copy: Backbone) -> None:
        """Change nothing."""

    def owns(self, key: str, module: nn.Module) -> bool:  # noqa: ARG002
        return True
