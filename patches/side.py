"""Side networks: a task's own network beside a frozen backbone, whose step outputs it reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from patches.backbone import Backbone
from patches.layers import draw_linear

NAME = "side"
"""Where the task's copy of the network holds its side network; the head stays in its own place."""
SIDE_SEEDS = 1 << 31
"""Added to the seed for a side network, so that it and the head do not begin with the same draws. The CPU's generator
looks at the lower 32 bits only."""


class SideNetwork(nn.Module):
    """Features from the outputs of a frozen backbone's steps; what it holds is the task's own.

    The step after the last one read is where tasks part: the steps before it run without autograd and in eval mode,
    once for all tasks (`patches.PatchBank`).
    """

    reads: tuple[int, ...]
    """Indices of the steps whose outputs on the frozen backbone it reads."""
    reads_images: ClassVar[bool] = False
    """Whether it reads the images too."""

    def condense(self, outputs: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """What is needed of the outputs: what is worth storing for each image, and is made once for all tasks.

        It is told by the class and `reads` alone, none of the task's own tensors takes part. By default the outputs
        themselves.

        Args:
            outputs: step index -> its output, for at least `reads`; as in `forward`.
        """
        return outputs

    def forward(self, copy: Backbone, images: Tensor, outputs: Mapping[int, Tensor]) -> Tensor:
        """Features (batch, inputs of the head).

        Args:
            copy: the task's copy of the network, whose later steps a side network may run and change.
            images: shape (batch, 3, height, width).
            outputs: what `condense` gave; to be read in order, each once, since they may be made on the way, and to be
                left as they are, other tasks read them too.
        """
        raise NotImplementedError

    def draw_head(self, inputs: int, outputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Weight (outputs, inputs) and bias (outputs,) of a fresh head."""
        return draw_linear(inputs, outputs, generator)


@dataclass
class SideMethod:
    """A patch method that puts a side network beside the backbone; it owns that and the head, and nothing else."""

    heads: frozenset[str] = field(init=False, default=frozenset())

    kind: ClassVar[str] = "side"
    foldable: ClassVar[bool] = False
    identity_at_start: ClassVar[bool] = False

    def build(self, copy: Backbone) -> SideNetwork:
        """Check the options, complete those left to the backbone, and make the side network from the CPU's generator.

        It may replace the head by one of another width.
        """
        raise NotImplementedError

    def attach(self, copy: Backbone) -> None:
        side = self.build(copy)
        # The floats take the backbone's dtype and device.
        copy.network.add_module(NAME, side.to(next(copy.network.parameters())))
        self.heads = frozenset(copy.heads())

    def owns(self, key: str, module: nn.Module) -> bool:  # noqa: ARG002
        return key.startswith(f"{NAME}.") or key.rpartition(".")[0] in self.heads


def side_of(network: nn.Module) -> SideNetwork:
    """Return the side network that a side method added to a task's copy of the network."""
    return cast(SideNetwork, network.get_submodule(NAME))
