"""The two layers in which a patched network differs from torchvision's own."""

from typing import Self

import torch
from torch import Tensor, nn


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


def draw_linear(in_features: int, out_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out), float32, uniform within 1 / sqrt(in_features) as `nn.Linear` draws them."""
    bound = in_features**-0.5
    weight = torch.empty(out_features, in_features).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(out_features).uniform_(-bound, bound, generator=generator)
    return weight, bias
