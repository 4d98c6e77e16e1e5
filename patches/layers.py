"""Layers that patched networks use and torchvision does not have, and functions that draw a fresh head."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional


class PatchedBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d that can be frozen: it then stays in eval mode even after `train()`."""

    frozen: bool = False
    """Whether `train()` leaves this layer in eval mode."""

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)


class FixedLinear(nn.Linear):
    """A Linear layer with random values that are never trained. They are in no state dict; a seed restores them."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)


class PatchConvolution(nn.Conv2d):
    """A depthwise convolution without bias on a grid of patches (batch, height, width, d).

    Zero padding keeps the grid's size. An even kernel gets one more row at the bottom and one more column at the right.
    """

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__(width, width, kernel_size, groups=width, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        before, after = (self.kernel_size[0] - 1) // 2, self.kernel_size[0] // 2
        x_nchw = functional.pad(input.permute(0, 3, 1, 2), (before, after, before, after))
        return super().forward(x_nchw).permute(0, 2, 3, 1)


def grid(patches: Tensor) -> Tensor:
    """Return the patch tokens (batch, side * side, d) of a square image as a grid (batch, side, side, d)."""
    side = math.isqrt(patches.shape[1])
    return patches.unflatten(1, (side, side))


def recomputed(function: Callable[..., Tensor], *arguments: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Return `function(*arguments)` and compute it again in the backward pass, so that no intermediate is kept.

    torch.utils.checkpoint does the same, but imports torch's compiler, which costs every training process 156 MB.

    Args:
        function: the function. It must not draw random numbers.
        parameters: the parameters that `function` may use. Gradients reach these and `arguments` only.
    """
    return _Recomputed.apply(function, len(arguments), *arguments, *parameters)


class _Recomputed(Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], count: int, *tensors: Tensor) -> Tensor:
        ctx.function, ctx.parameters = function, tensors[count:]
        # Saving the parameters too makes autograd raise if they are changed before the backward pass.
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
    """Draw a head as `nn.Linear` does: uniform within ±1 / sqrt(in_features).

    Returns:
        The weight (out_features, in_features) and the bias (out_features,), float32.
    """
    bound = in_features**-0.5
    weight = torch.empty(out_features, in_features).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(out_features).uniform_(-bound, bound, generator=generator)
    return weight, bias


def draw_truncated_linear(in_features: int, out_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a head from a normal distribution with standard deviation 0.02, truncated at ±2. The bias is zero.

    Returns:
        The weight (out_features, in_features) and the bias (out_features,), float32.
    """
    weight = nn.init.trunc_normal_(torch.empty(out_features, in_features), std=0.02, generator=generator)
    return weight, torch.zeros(out_features)
