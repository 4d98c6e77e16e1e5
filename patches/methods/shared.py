"""The method `shared`: a task has no private tensors."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from patches.backbone import Backbone


@dataclass
class Shared:
    """Give the task no tensors of its own. It is the backbone itself, as a reference for the other methods.

    Two such tasks that use the backbone's own head therefore always give the same logits.
    """

    kind: ClassVar[str] = "selection"
    foldable: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True

    def attach(self, copy: Backbone) -> None:
        """Change nothing."""

    def owns(self, key: str, module: nn.Module) -> bool:  # noqa: ARG002
        return False
