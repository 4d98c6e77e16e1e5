"""The protocol that every patch method follows."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import nn

from patches.backbone import Backbone


class Patch(Protocol):
    """A way to fit a shared backbone to one task.

    A method is a dataclass. The fields that its constructor takes are its options. There are three kinds:

    - A selection method owns some of the network's own tensors.
    - An insertion method adds modules to the copy in `attach`, and owns their tensors.
    - A side method adds a network that reads the step outputs of the frozen backbone, and owns that network and the
      head. It derives from `patches.side.SideMethod`.
    """

    kind: ClassVar[str]
    """"selection", "insertion" or "side"."""
    foldable: ClassVar[bool]
    """Whether `fold` can turn the patched model into a plain network."""
    identity_at_start: ClassVar[bool]
    """Whether a fresh patch leaves the backbone's features as they are, in eval mode. For a side method: whether its
    trained branches add exactly nothing at the start, so that the head reads the features of the frozen backbone."""

    def attach(self, copy: Backbone) -> None:
        """Check that the method fits, and change the task's own copy of the network in place.

        Args:
            copy: the task's copy of the backbone. Its tensors still alias the backbone's, so the method may replace
                or add modules and tensors, but must not write into the values that are there.
        Raises:
            PatchError: the method or one of its options does not fit this backbone.
        """

    def owns(self, key: str, module: nn.Module) -> bool:
        """Return whether a tensor is private to the task. It is called after `attach`.

        Args:
            key: the tensor's state-dict name in the copy.
            module: the module that holds the tensor directly.
        """


@dataclass(frozen=True)
class MethodInfo:
    """The facts about a patch method that are known before it is attached."""

    kind: str
    """"selection", "insertion" or "side"."""
    foldable: bool
    """Whether `fold` can turn a patched model of this method into a plain network."""
    identity_at_start: bool
    """Whether a fresh patch leaves the backbone's features as they are, in eval mode."""
