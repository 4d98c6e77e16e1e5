"""The layers in which patched networks differ from torchvision's own, and how heads are drawn."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional


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


def recomputed(function: Callable[..., Tensor], *arguments: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """`function(*arguments)`, which the backward pass computes anew: of what lies between it keeps nothing.

    torch.utils.checkpoint does the same, and imports torch's compiler for it: 156 MB in every process that trains.

    Args:
        function: draws no random numbers.
        parameters: those whose gradient may pass through `function`; it may use fewer.
    """
    return _Recomputed.apply(function, len(arguments), *arguments, *parameters)


class _Recomputed(Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], count: int, *tensors: Tensor) -> Tensor:
        ctx.function, ctx.parameters = function, tensors[count:]
        # The parameters too: to read them after they were changed is an error.
        ctx.save_for_backward(*tensors)
        device = tensors[0].device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return function(*tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        count = len(needed) - len(ctx.parameters)
        arguments = [tensor.detach() for tensor in ctx.saved_tensors[:count]]
        for tensor, needs in zip(arguments, needed, strict=False):
            tensor.requires_grad_(needs)
        inputs = [*arguments, *ctx.parameters]
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            output = ctx.function(*arguments)
        wanted = [tensor for tensor, needs in zip(inputs, needed, strict=True) if needs]
        gradients = iter(torch.autograd.grad(output, wanted, gradient, allow_unused=True))
        return None, None, *(next(gradients) if needs else None for needs in needed)


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
