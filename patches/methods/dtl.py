"""Disentangled transfer learning: a low-rank side network that writes back into the last blocks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from patches.backbone import Backbone
from patches.errors import PatchError
from patches.layers import PatchConvolution, draw_truncated_linear, grid, recomputed
from patches.options import SWITCH, check_choice, check_whole
from patches.side import SideMethod, SideNetwork

RANKS = {"vit_b_16": 2, "swin_b": 4}
"""Default rank for each backbone that DTL is defined on."""


@dataclass
class DTL(SideMethod):
    """Collect what blocks read through low-rank maps, and add the sum to what later blocks give.

    Before block i: h ← h + z'ᵢ aᵢ cᵢ, z'ᵢ what the block reads, aᵢ (d, r), cᵢ (r, d), h = 0 at the start of a stage.
    From block M on, after the block: z'ᵢ₊₁ = zᵢ₊₁ + θ(h), θ(x) = x · sigmoid(βx). The blocks up to M read the same for
    every task, so that gradients cross the blocks after M only. Collecting begins in the stage of block M: what came
    before, the reset would discard. Swin's mergings are not adapted.

    `first_block` is M, counted from 1; by default 5/8 of the blocks (7 of ViT-B/16's 12, 15 of Swin-B's 24, where
    collecting thus begins at block 5). `rank` is r, by default 2 on ViT and 4 on Swin. `theta` False adds h itself, as
    the paper's ablation. `readout`: "patch_mean", the mean of the patch tokens and then the last LayerNorm on ViT,
    Swin's own LayerNorm and then the mean; or "class_token", torchvision's own on ViT.

    Source: Fu, Zhu and Wu, "DTL: Disentangled Transfer Learning for Visual Recognition", AAAI 2024, arXiv:2312.07856.
        The defaults, M and the readout are those of its official code.
    """

    first_block: int | None = None
    rank: int | None = None
    beta: float = 100.0
    readout: Literal["patch_mean", "class_token"] = "patch_mean"
    theta: bool = True

    identity_at_start: ClassVar[bool] = True

    def build(self, copy: Backbone) -> SideNetwork:
        if copy.name not in RANKS:
            raise PatchError(
                f"The DTL methods are defined on {' and '.join(RANKS)}, and this backbone is '{copy.name}'. "
                "Use one of those, or patch method 'parasite' beside a convolutional network."
            )
        if self.first_block is None:
            self.first_block = max(1, 5 * copy.num_blocks // 8)
        if self.rank is None:
            self.rank = RANKS[copy.name]
        check_whole("first_block", self.first_block, 1, copy.num_blocks)
        check_whole("rank", self.rank, 1, None)
        if not (isinstance(self.beta, int | float) and math.isfinite(self.beta) and self.beta > 0):
            raise PatchError(f"Option beta={self.beta!r}: use a number above 0 (the paper's is 100).")
        check_choice("readout", self.readout, ("patch_mean", "class_token"))
        check_choice("theta", self.theta, SWITCH)
        if self.readout == "class_token" and copy.name == "swin_b":
            raise PatchError("Option readout='class_token': Swin has no class token. Use patch_mean.")
        return DTLNetwork(
            widths=_block_widths(copy),
            stages=copy.stages,
            first_block=self.first_block,
            rank=self.rank,
            beta=self.beta if self.theta else None,
            kernel_size=self._kernel_size(),
            class_tokens=int(copy.name == "vit_b_16"),
            readout=self.readout,
        )

    def _kernel_size(self) -> int | None:
        return None


@dataclass
class DTLPlus(DTL):
    """DTL that adds g(θ(h)): g is a depthwise convolution on the patch grid, one for each stage.

    `kernel_size` k: zero padding keeps the grid's size, for an even k with the extra row and column at the bottom and
    right. No bias. The class token's row of θ(h) is added as it is.

    Source: as DTL. The paper calls g separable; its official code and parameter counts have no pointwise part.
    """

    kernel_size: int = 5

    def _kernel_size(self) -> int:
        check_whole("kernel_size", self.kernel_size, 1, None)
        return self.kernel_size


@dataclass
class DTLPlusStar(DTLPlus):
    """DTL+ that writes back after every block: M = 1.

    Source: as DTL.
    """

    first_block: int | None = 1


class DTLNetwork(SideNetwork):
    """The maps aᵢ, cᵢ for each collected block and g for each stage written to."""

    def __init__(
        self,
        *,
        widths: Mapping[int, int],
        stages: tuple[int, ...],
        first_block: int,
        rank: int,
        beta: float | None,
        kernel_size: int | None,
        class_tokens: int,
        readout: str,
    ) -> None:
        """Args:
        widths: block -> the width that it reads and gives.
        stages: the first block of each stage.
        beta: of θ, or None without θ.
        kernel_size: of g, or None without g.
        class_tokens: tokens before the patches; on a Swin, whose maps are grids (batch, height, width, width d), 0.
        """
        super().__init__()
        self.stages = stages
        self.first_block = first_block
        self.beta = beta
        self.class_tokens = class_tokens
        self.readout = readout
        self.start = max(stage for stage in stages if stage <= first_block)
        """The first block collected."""
        self.reads = tuple(range(self.start - 1, first_block + 1))
        blocks = range(self.start, max(widths) + 1)
        self.blocks = nn.ModuleDict({str(block): LowRank(widths[block], rank) for block in blocks})
        written = dict.fromkeys(self._stage(block) for block in blocks if block >= first_block)
        self.convolutions = nn.ModuleDict(
            {str(stage): PatchConvolution(widths[stage], kernel_size) for stage in written if kernel_size is not None}
        )

    def forward(self, copy: Backbone, images: Tensor, outputs: Mapping[int, Tensor]) -> Tensor:  # noqa: ARG002
        collected: list[Tensor] = []
        for block in range(self.start, self.first_block + 1):
            collected.append(self.blocks[str(block)](copy.enter(outputs[block - 1], block)))
        x = self._written(outputs[self.first_block], collected, self.first_block)
        for block in range(self.first_block + 1, copy.num_blocks + 1):
            x = copy.enter(x, block)
            collected = [*(collected if block not in self.stages else ()), self.blocks[str(block)](x)]
            x = self._written(copy.run_entered(x, block), collected, block)
        if self.readout == "patch_mean" and self.class_tokens:
            return copy.network.get_submodule("encoder.ln")(x[:, self.class_tokens :].mean(1))
        return copy.run(x, copy.num_blocks + 1, copy.num_blocks + 2)

    def draw_head(self, inputs: int, outputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return draw_truncated_linear(inputs, outputs, generator)

    def _written(self, x: Tensor, collected: list[Tensor], block: int) -> Tensor:
        """The output of a block and what is added to it.

        Args:
            collected: x a of the stage's blocks so far, in order.
        """
        first = block + 1 - len(collected)
        c = torch.cat([self.get_parameter(f"blocks.{number}.c") for number in range(first, block + 1)])
        # h is as large as the output, what it is made of is small.
        branch = recomputed(
            partial(self._branch, block),
            torch.cat(collected, dim=-1),
            self._scale * c,
            parameters=self.convolutions.parameters(),
        )
        # In train mode attention gives its output in another order of axes. Left so, the next block's map a would make
        # a contiguous copy and keep it beside the one that the block keeps.
        return torch.add(x.contiguous(), branch, alpha=1 / self._scale)

    def _branch(self, block: int, collected: Tensor, c: Tensor) -> Tensor:
        """What is added to the output of a block, times β.

        Args:
            collected: x a of the stage's blocks so far, side by side.
            c: theirs, one below the other, times β.
        """
        x = collected @ c
        if self.beta is not None:
            # silu(βh) = β · h · sigmoid(βh); where no gradient is needed, in the place of βh.
            x = functional.silu(x, inplace=not torch.is_grad_enabled())
        if not self.convolutions:
            return x
        convolution = self.convolutions[str(self._stage(block))]
        if not self.class_tokens:
            return convolution(x)
        classes, patches = x[:, : self.class_tokens], x[:, self.class_tokens :]
        return torch.cat([classes, convolution(grid(patches)).flatten(1, 2)], dim=1)

    @property
    def _scale(self) -> float:
        return 1.0 if self.beta is None else self.beta

    def _stage(self, block: int) -> int:
        return max(stage for stage in self.stages if stage <= block)


class LowRank(nn.Module):
    """x a c, for a (d, r) and c (r, d); zero at the start. What it gives itself is x a."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        # Kaiming-uniform with slope √5 comes to 1/√d.
        self.a = nn.Parameter(torch.empty(width, rank).uniform_(-(width**-0.5), width**-0.5))
        self.c = nn.Parameter(torch.zeros(rank, width))

    def forward(self, x: Tensor) -> Tensor:
        # With so few columns, reading a row by row takes two to three times as long as copying and reading its columns.
        return functional.linear(x, self.a.T.contiguous())


def _block_widths(copy: Backbone) -> dict[int, int]:
    """Block -> the width of the tokens that it reads and gives, on ViT or Swin."""
    paths = {block: copy.paths(block, block + 1)[-1] for block in range(1, copy.num_blocks + 1)}
    return {block: copy.network.get_parameter(f"{path}.mlp.0.weight").shape[1] for block, path in paths.items()}
