"""The layers in which patched networks differ from torchvision's own, and how heads are drawn."""

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class PatchedBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d that can be kept in eval mode, whichever module `train()` is called on."""

    frozen: bool = False

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)


class FixedLinear(nn.Linear):
    """A Linear layer whose random values are never trained and are in no state dict: a seed brings them back."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)


class PatchConvolution(nn.Conv2d):
    """A depthwise convolution, without bias, of a grid of patches (batch, height, width, d); the grid keeps its size.

    Zeros are added around it, for an even kernel one row and column more at the bottom and right.
    """

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__(width, width, kernel_size, groups=width, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        before, after = (self.kernel_size[0] - 1) // 2, self.kernel_size[0] // 2
        x_nchw = functional.pad(input.permute(0, 3, 1, 2), (before, after, before, after))
        return super().forward(x_nchw).permute(0, 2, 3, 1)


def grid(patches: Tensor) -> Tensor:
    """The patch tokens (batch, side * side, d) of a square image as their grid (batch, side, side, d)."""
    side = math.isqrt(patches.shape[1])
    return patches.unflatten(1, (side, side))


def recomputed(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """`function(*arguments)`, of which the backward pass keeps only the arguments: what lies between it makes again, up
    to the last tensor that it needs. For a function without random numbers."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def draw_linear(in_features: int, out_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out), float32, uniform within 1 / sqrt(in_features) as `nn.Linear` draws them."""
    bound = in_features**-0.5
    weight = torch.empty(out_features, in_features).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(out_features).uniform_(-bound, bound, generator=generator)
    return weight, bias


def draw_truncated_linear(in_features: int, out_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weight (out, in) from a normal of deviation 0.02, cut at ±2, and bias (out) of zeros, float32."""
    weight = nn.init.trunc_normal_(torch.empty(out_features, in_features), std=0.02, generator=generator)
    return weight, torch.zeros(out_features)
