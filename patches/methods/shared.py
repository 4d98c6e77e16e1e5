"""No private tensors."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from patches.backbone import Backbone


@dataclass
class Shared:
    """Give the task nothing of its own: it is the backbone as it stands, for the comparison with methods that own some.

    So two tasks with the backbone's own head never come apart, by design.
    """

    kind: ClassVar[str] = "selection"
    foldable: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True

    def attach(self, copy: Backbone) -> None:
        """Nothing to change."""

    def owns(self, key: str, module: nn.Module) -> bool:  # noqa: ARG002
        return False
