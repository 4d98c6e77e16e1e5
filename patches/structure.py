"""Copying a network's structure with chosen tensors, drawing from a seed, and hashing tensors."""

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def copy_structure(network: Network, tensor_copy: Callable[[Tensor], Tensor]) -> Network:
    """A deep copy of `network` in which every parameter and buffer t is `tensor_copy(t)`.

    A copied parameter is a Parameter object of its own with the original's `requires_grad`; gradients stay behind.
    """
    memo: dict[int, object] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(tensor_copy(parameter.detach()), requires_grad=parameter.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = tensor_copy(buffer.detach())
    return copy.deepcopy(network, memo)


def alias(tensor: Tensor) -> Tensor:
    """Another tensor object over the same storage."""
    return tensor.detach()


def meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and dtype that holds no values."""
    return tensor.to("meta")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from the CPU's generator as it is after `seed`, and put it back."""
    before = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(before)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values as bytes in contiguous order, whatever its strides and device."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over the sorted names, and each tensor's dtype, shape and contiguous bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\n{dtype_name(tensor)}\n{list(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def dtype_name(tensor: Tensor) -> str:
    """For instance "float32"."""
    return str(tensor.dtype).removeprefix("torch.")
