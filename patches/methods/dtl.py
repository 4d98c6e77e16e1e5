"""The methods `dtl`, `dtl_plus` and `dtl_plus_star`: disentangled transfer learning.

A low-rank side network collects the inputs of blocks and adds the sum to the outputs of the last blocks.
"""

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
from patches.options import SWITCH, check_choice, check_whole, is_number
from patches.quoting import quoted
from patches.side import SideMethod, SideNetwork

RANKS = {"vit_b_16": 2, "swin_b": 4}
"""The backbones that DTL is defined on, with the default rank for each."""


@dataclass
class DTL(SideMethod):
    """Collect the inputs of blocks through low-rank maps, and add the sum to the outputs of later blocks.

    Let z'ᵢ be the input of block i, with aᵢ of shape (d, r) and cᵢ of shape (r, d). Before block i: h ← h + z'ᵢ aᵢ cᵢ,
    with h = 0 at the start of a stage. After block i, from block M on: z'ᵢ₊₁ = zᵢ₊₁ + θ(h), with
    θ(x) = x · sigmoid(βx). The inputs of the blocks up to M are the same for every task, so gradients cross only the
    blocks after M. Collecting begins in the stage of block M, because the reset of h at a stage discards everything
    before. Swin's mergings are not adapted.

    Source: Fu, Zhu and Wu, "DTL: Disentangled Transfer Learning for Visual Recognition", AAAI 2024, arXiv:2312.07856.
        The defaults, M and the readout are those of its official code.
    """

    first_block: int | None = None
    """M, counted from 1. The default is 5/8 of the blocks: 7 of ViT-B/16's 12, and 15 of Swin-B's 24, where collecting
    therefore begins at block 5."""
    rank: int | None = None
    """The rank r. The default is 2 on ViT and 4 on Swin."""
    beta: float = 100.0
    """β in θ."""
    readout: Literal["patch_mean", "class_token"] = "patch_mean"
    """How the last tokens become features. On ViT, "patch_mean" takes the mean of the patch tokens and then the last
    LayerNorm, and "class_token" is torchvision's own readout. Swin's own readout, LayerNorm and then the mean, counts
    as "patch_mean"."""
    theta: bool = True
    """Whether θ is used. False adds h itself, as an ablation in the paper does."""

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
        if not (is_number(self.beta) and self.beta > 0):
            raise PatchError(f"Option beta={quoted(self.beta)}: use a number above 0 (the paper's is 100).")
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
        """Return the size of the kernels of g, or None without g."""
        return None


@dataclass
class DTLPlus(DTL):
    """DTL that adds g(θ(h)) instead of θ(h). Here g is a depthwise convolution on the patch grid, one for each stage.

    The convolution has no bias. Zero padding keeps the grid's size (see `PatchConvolution`). The class token has no
    place on the grid, and its θ(h) is added without g.

    Source: the paper of `DTL`. It calls g separable, but its official code and parameter counts have no pointwise part.
    """

    kernel_size: int = 5
    """Side of the kernel of g, in patches."""

    def _kernel_size(self) -> int:
        check_whole("kernel_size", self.kernel_size, 1, None)
        return self.kernel_size


@dataclass
class DTLPlusStar(DTLPlus):
    """DTL+ that adds to the output of every block: M = 1.

    Source: the paper of `DTL`.
    """

    first_block: int | None = 1


class DTLNetwork(SideNetwork):
    """The side network of the DTL methods: aᵢ and cᵢ for each collected block, and g for each stage that is written to.

    The formulas are in `DTL` and `DTLPlus`.
    """

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
        widths: block -> the width d of its input and output.
        stages: the first block of each stage.
        first_block: M.
        rank: r.
        beta: β of θ, or None without θ.
        kernel_size: size of the kernels of g, or None without g.
        class_tokens: number of tokens before the patch tokens. It is 0 on Swin, whose maps are grids
            (batch, height, width, d).
        readout: "patch_mean" or "class_token".
        """
        super().__init__()
        self.stages = stages
        self.first_block = first_block
        self.beta = beta
        self.class_tokens = class_tokens
        self.readout = readout
        self.start = max(stage for stage in stages if stage <= first_block)
        """The first block whose input is collected."""
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
        """Return the output `x` of a block plus the side network's part: θ(h) or g(θ(h)).

        Args:
            collected: z' a of the stage's blocks up to this one, in order.
        """
        first = block + 1 - len(collected)
        c = torch.cat([self.get_parameter(f"blocks.{number}.c") for number in range(first, block + 1)])
        # h is as large as the output, but `collected` and `c` are small. Therefore only they are kept for the backward
        # pass, which computes h again.
        branch = recomputed(
            partial(self._branch, block),
            torch.cat(collected, dim=-1),
            self._scale * c,
            parameters=self.convolutions.parameters(),
        )
        # In train mode attention's output is not contiguous. Without this copy, the next block's map a would make a
        # contiguous one, and autograd would keep it in addition to the tensor that the block itself keeps.
        return torch.add(x.contiguous(), branch, alpha=1 / self._scale)

    def _branch(self, block: int, collected: Tensor, c: Tensor) -> Tensor:
        """Return the side network's part of a block's output, multiplied by β.

        Args:
            collected: z' a of the stage's blocks up to this one, concatenated along the last axis.
            c: c of the same blocks, concatenated along the first axis and multiplied by β.
        """
        x = collected @ c
        if self.beta is not None:
            # silu(βh) = β · h · sigmoid(βh). Without autograd it overwrites βh to save memory.
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
        """β, or 1 without θ."""
        return 1.0 if self.beta is None else self.beta

    def _stage(self, block: int) -> int:
        """Return the first block of the stage that a block is in."""
        return max(stage for stage in self.stages if stage <= block)


class LowRank(nn.Module):
    """The map x a c with a of shape (d, r) and c of shape (r, d). It starts at zero. `forward` returns only x a."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        # Kaiming-uniform initialisation with slope √5 has the bound 1/√d.
        self.a = nn.Parameter(torch.empty(width, rank).uniform_(-(width**-0.5), width**-0.5))
        self.c = nn.Parameter(torch.zeros(rank, width))

    def forward(self, x: Tensor) -> Tensor:
        # `a` has very few columns. Copying its transpose first makes the product two to three times as fast.
        return functional.linear(x, self.a.T.contiguous())


def _block_widths(copy: Backbone) -> dict[int, int]:
    """Return, for a ViT or Swin, the width of each block's input and output tokens: block -> d."""
    paths = {block: copy.paths(block, block + 1)[-1] for block in range(1, copy.num_blocks + 1)}
    return {block: copy.network.get_parameter(f"{path}.mlp.0.weight").shape[1] for block, path in paths.items()}
