"""Fold a patched model into a plain torchvision network with the same outputs."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from patches.errors import PatchError
from patches.layers import FixedLinear
from patches.methods import METHODS
from patches.model import PatchedModel
from patches.structure import copy_structure


def fold(model: PatchedModel) -> nn.Module:
    """Return a standalone network of torchvision's class that gives the model's eval-mode outputs.

    Every BatchNorm is merged into the convolution before it: W' = W γ / sqrt(σ² + ε) per output channel and
    b' = β - μ γ / sqrt(σ² + ε), computed in float64 and rounded once. A fixed head becomes an ordinary Linear layer.
    LayerNorm depends on the input and stays, so a ViT or Swin becomes a plain copy.

    Returns:
        The network in eval mode. It shares no storage with the model.
    Raises:
        PatchError: a method of the model cannot be folded.
    Source: Mudrakarta et al., "K for the Price of 1", ICLR 2019, arXiv:1810.10703, section 3.
    """
    for name in model.method.split("+"):
        if not METHODS[name].foldable:
            raise PatchError(
                f"Patch method '{name}' cannot be folded: a plain network has no layer that computes the same. "
                "Run the patched model itself."
            )
    plain = copy_structure(model.network, torch.clone).requires_grad_(True)
    for path, layer in list(plain.named_modules()):
        if isinstance(layer, FixedLinear):
            plain.set_submodule(path, _linear(layer.weight, layer.bias))
    merge_norms(plain)
    return plain.eval()


def merge_norms(network: nn.Module) -> None:
    """Merge every BatchNorm of a network into the convolution before it, in place. See `fold`."""
    for parent, conv_name, norm_name in list(_conv_norm_pairs(network)):
        conv, norm = getattr(parent, conv_name), getattr(parent, norm_name)
        _fold_pair(conv, norm)
        setattr(parent, norm_name, nn.Identity())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()), "a BatchNorm follows no conv"


def _conv_norm_pairs(network: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield (parent, convolution's name, BatchNorm's name) for each pair of layers to fold.

    torchvision registers a BatchNorm right after the convolution that it follows.
    """
    for parent in network.modules():
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                yield parent, conv_name, norm_name


def _fold_pair(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    dtype = conv.weight.dtype
    mean, variance, scale, bias = (
        tensor.detach().double()
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        if tensor is not None
    )
    old_bias = None if conv.bias is None else conv.bias.detach().double()
    weight, new_bias = fuse_conv_bn_weights(
        conv.weight.detach().double(), old_bias, mean, variance, norm.eps, scale, bias
    )
    conv.weight = nn.Parameter(weight.detach().to(dtype))
    conv.bias = nn.Parameter(new_bias.detach().to(dtype))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer
