"""Layers of patched networks."""

import pytest
import torch
from torch import Tensor, nn

from patches.layers import recomputed


def saved_bytes(function, *arguments: Tensor) -> tuple[Tensor, int]:
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        return function(*arguments), sum(sizes.values())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recomputed_keeps_its_arguments_only_and_gives_the_same_gradients(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    layer, unused, frozen = nn.Linear(4, 64), nn.Linear(1, 1), nn.Linear(64, 8).requires_grad_(False)
    x, y = torch.randn(500, 4, requires_grad=True), torch.randn(500, 8)
    parameters = [*layer.parameters(), *unused.parameters(), *frozen.parameters()]
    own = [x, *layer.parameters()]

    def plain(x: Tensor, y: Tensor) -> Tensor:
        return frozen(torch.tanh(layer(x)).square()) * y

    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        (expected, before), (found, after) = (
            saved_bytes(function, x, y)
            for function in (plain, lambda x, y: recomputed(plain, x, y, parameters=parameters))
        )
    held = sum(tensor.nbytes for tensor in (x, y, *parameters))
    assert after == held < before
    assert torch.equal(found, expected)
    gradients = torch.autograd.grad(expected.sum(), own)
    assert all(gradient.any() for gradient in gradients)
    for gradient, wanted in zip(torch.autograd.grad(found.sum(), own), gradients, strict=True):
        assert torch.equal(gradient, wanted)


def test_recomputed_refuses_parameters_that_were_changed_meanwhile() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    found = recomputed(layer, x, parameters=layer.parameters())
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()
