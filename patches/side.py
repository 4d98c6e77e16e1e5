"""Side networks: a task's own network beside a frozen backbone, whose step outputs it reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from patches.backbone import Backbone
from patches.layers import draw_linear

NAME = "side"
"""Name under which the task's copy of the network holds its side network. The head stays in its usual place."""
SIDE_SEEDS = 1 << 31
"""Added to the seed when a side network is drawn, so that it does not begin with the same numbers as the head. The bit
must be below 2 ** 32, because the CPU's generator uses the lower 32 bits of a seed only."""


class SideNetwork(nn.Module):
    """A network that computes features from the step outputs of a frozen backbone. The task owns all its tensors.

    The steps up to the last one that is read run without autograd and in eval mode. `patches.PatchBank` runs them once
    for all tasks.
    """

    reads: tuple[int, ...]
    """Indices of the steps whose outputs this network reads, in ascending order."""
    reads_images: ClassVar[bool] = False
    """Whether this network reads the images too."""

    def condense(self, outputs: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """Reduce the step outputs to what `forward` needs, and what is worth storing for each image.

        It runs once for all tasks that have the same class and the same `reads`. Therefore it must not use the task's
        own tensors. By default it returns the outputs themselves.

        Args:
            outputs: step index -> output. It holds at least the steps in `reads`. See `forward`.
        """
        return outputs

    def forward(self, copy: Backbone, images: Tensor, outputs: Mapping[int, Tensor]) -> Tensor:
        """Return the features (batch, inputs of the head).

        Args:
            copy: the task's copy of the network. A side network may run and change its later steps.
            images: shape (batch, 3, height, width).
            outputs: what `condense` returned. Read the outputs in ascending order and each one once, because they may
                be computed when they are read. Do not change them in place, because other tasks read them too.
        """
        raise NotImplementedError

    def draw_head(self, inputs: int, outputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the weight (outputs, inputs) and the bias (outputs,) of a fresh head, float32."""
        return draw_linear(inputs, outputs, generator)


@dataclass
class SideMethod:
    """Base of the patch methods that put a side network beside the backbone. The task owns it and the head."""

    heads: frozenset[str] = field(init=False, default=frozenset())
    """Paths of the heads, which `attach` finds."""

    kind: ClassVar[str] = "side"
    foldable: ClassVar[bool] = False
    identity_at_start: ClassVar[bool] = False

    def build(self, copy: Backbone) -> SideNetwork:
        """Check the options and make the side network. Its random values come from the CPU's global generator.

        It also writes a value into each option that was left to the backbone. It may replace the head by one with
        another number of inputs.

        Raises:
            PatchError: the backbone or an option does not fit.
        """
        raise NotImplementedError

    def attach(self, copy: Backbone) -> None:
        side = self.build(copy)
        # `to` gives the side network the backbone's floating dtype and device.
        copy.network.add_module(NAME, side.to(next(copy.network.parameters())))
        self.heads = frozenset(copy.heads())

    def owns(self, key: str, module: nn.Module) -> bool:  # noqa: ARG002
        return key.startswith(f"{NAME}.") or key.rpartition(".")[0] in self.heads


def side_of(network: nn.Module) -> SideNetwork:
    """Return the side network that a side method added to a task's copy of the network."""
    return cast(SideNetwork, network.get_submodule(NAME))
