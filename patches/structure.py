"""Copy a network's structure with other tensors, draw random numbers from a seed, and hash tensors."""

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def copy_structure(network: Network, tensor_copy: Callable[[Tensor], Tensor]) -> Network:
    """Return a deep copy of `network` in which every parameter and buffer t is replaced by `tensor_copy(t)`.

    Each parameter of the copy is a new Parameter object with the original's `requires_grad`. Gradients are not copied.
    """
    memo: dict[int, object] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(tensor_copy(parameter.detach()), requires_grad=parameter.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = tensor_copy(buffer.detach())
    return copy.deepcopy(network, memo)


def alias(tensor: Tensor) -> Tensor:
    """Return a new tensor object over the same storage."""
    return tensor.detach()


def meta(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape and dtype that holds no values."""
    return tensor.to("meta")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's global generator for the length of a block, and restore its state afterwards."""
    before = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(before)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the tensor's values as bytes in contiguous order. Its strides and device make no difference."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hex) over the tensors in the order of their names: name, dtype, shape, contiguous bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\n{dtype_name(tensor)}\n{list(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, or None if all values are finite."""
    return next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)


def dtype_name(tensor: Tensor) -> str:
    """Return the name of the tensor's dtype without "torch.", for example "float32"."""
    return str(tensor.dtype).removeprefix("torch.")
