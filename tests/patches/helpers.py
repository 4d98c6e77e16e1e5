"""Small networks in which every tensor has an effect, and functions that several tests use on them."""

import json
import struct
from collections.abc import Callable
from functools import cache
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import patches
from patches import Backbone, PatchedModel
from patches.sealed import UNSEALED, seal

SMALL = {
    "stem_stride": 1,
    "last_channel": 32,
    "inverted_residual_setting": [[1, 8, 1, 1], [4, 16, 2, 2], [4, 24, 1, 1]],
}
# name -> (options, image size in pixels). The size is the smallest one that the network takes.
NETWORKS: dict[str, tuple[dict[str, Any], int]] = {
    "mobilenet_v2": ({}, 32),
    "inception_v3": ({}, 75),
    "resnet18": ({}, 32),
    "resnet50": ({}, 32),
    "vit_b_16": ({"image_size": 32}, 32),
    "swin_b": ({}, 32),
}
# name -> (network, options), for 32 px images and 5 classes
SMALL_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "small_vit": (
        "vit_b_16",
        {"image_size": 32, "patch_size": 8, "num_layers": 4, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24},
    ),
    "small_swin": (
        "swin_b",
        {"embed_dim": 8, "depths": [1, 1, 3, 1], "num_heads": [1, 2, 2, 4], "window_size": [2, 2]},
    ),
}


def small_backbone(dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> Backbone:
    """Return a MobileNetV2 of about 10,000 parameters for 16 px images and 5 classes."""
    backbone = patches.load_backbone("mobilenet_v2", num_classes=5, seed=seed, **{**SMALL, **options})
    return randomised(backbone, seed).to(dtype)


@cache
def network(name: str) -> Backbone:
    """Return one of NETWORKS or SMALL_TRANSFORMERS. All tests share it, so do not change its values."""
    if name in SMALL_TRANSFORMERS:
        return small_transformer(name)
    options, _ = NETWORKS[name]
    return randomised(patches.load_backbone(name, **options))


def small_transformer(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Backbone:
    """Return a new network that is described in SMALL_TRANSFORMERS."""
    family, small = SMALL_TRANSFORMERS[name]
    return randomised(patches.load_backbone(family, num_classes=5, **{**small, **options})).to(dtype)


def randomise_side(model: PatchedModel, seed: int = 1) -> PatchedModel:
    """Give every parameter of a side network random values, because some of them start as zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.private_state().items():
        if name.startswith("side.") and isinstance(tensor, nn.Parameter):
            tensor.data.uniform_(-0.5, 0.5, generator=generator)
    return model


def randomised(backbone: Backbone, seed: int = 0) -> Backbone:
    """Give normalisation layers and heads random values, because ones, zeros and equal rows hide mistakes."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor | None, low: float, high: float) -> None:
        assert tensor is not None
        tensor.data.uniform_(low, high, generator=generator)

    for layer in backbone.norm_layers().values():
        uniform(layer.weight, 0.5, 1.5)
        uniform(layer.bias, -0.5, 0.5)
        if isinstance(layer, nn.BatchNorm2d):
            uniform(layer.running_mean, -0.5, 0.5)
            uniform(layer.running_var, 0.5, 1.5)
    for head in backbone.heads().values():
        uniform(head.weight, -0.1, 0.1)
        uniform(head.bias, -0.1, 0.1)
    return backbone


def images(count: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """Return the bytes of each tensor. Comparing them distinguishes one NaN from another, and -0.0 from 0.0."""
    return {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in tensors.items()}


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def train(model: PatchedModel, steps: int = 2, size: int = 16, count: int = 8) -> None:
    """Train all parameters that take gradients for a few steps with a large learning rate, in train mode."""
    model.train()
    torch.manual_seed(0)  # dropout
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for step in range(steps):
        output = model(images(count, size, seed=step))
        logits = output if isinstance(output, Tensor) else output.logits + output.aux_logits
        if parameters:
            labels = torch.arange(count) % model.num_classes
            gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= 0.1 * gradient
    model.eval()


def rewritten(whole: bytes, change: Callable[[dict], object], tensors: dict | None = None) -> bytes:
    """Return a sealed file with another manifest or other tensors, and with the hash that fits them."""
    header = json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])
    manifest = json.loads(header["__metadata__"]["manifest"])
    manifest["payload_sha256"] = UNSEALED
    change(manifest)
    text = json.dumps(manifest, separators=(",", ":"))
    sealed, _ = seal(safetensors.torch.save(tensors or safetensors.torch.load(whole), {"manifest": text}))
    return sealed
