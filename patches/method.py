"""What a patch method is."""

import dataclasses
from typing import ClassVar, Protocol

from torch import nn

from patches.backbone import Backbone


class Patch(Protocol):
    """A way to fit a shared backbone to one task; its fields are its options (a dataclass, `init` fields).

    A selection method owns some of the network's own tensors. A side method (`patches.side.SideMethod`) adds a network
    that reads the frozen backbone's step outputs, and owns it and the head. An insertion method, later, adds modules to
    the copy in `attach` and owns their tensors too.
    """

    kind: ClassVar[str]
    """"selection", "insertion" or "side"."""
    foldable: ClassVar[bool]
    """Whether `fold` can turn the patched model into a plain network."""
    identity_at_start: ClassVar[bool]
    """Whether a fresh patch leaves the backbone's features as they are, in eval mode. Of a side method: whether its
    trained branches add exactly nothing at the start, so that the head reads what the frozen backbone alone gives."""

    def attach(self, copy: Backbone) -> None:
        """Check and change, in place, the task's own copy of the network; its tensors still alias the backbone's."""

    def owns(self, key: str, module: nn.Module) -> bool:
        """Say whether the state-dict tensor `key`, held directly by `module`, is the task's own."""


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """What is known of a method before it is attached."""

    kind: str
    foldable: bool
    identity_at_start: bool
