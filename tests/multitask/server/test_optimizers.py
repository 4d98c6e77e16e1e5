import pytest
import torch
from timm.optim import RMSpropTF as TimmRMSpropTF
from torch import Tensor

from multitask.server.optimizers import RMSpropTF, make_optimizer

OPTIONS = {"decay": 0.9, "momentum": 0.9, "eps": 1.0}


def gradients(steps: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(steps)]


def test_rmsprop_follows_tensorflows_formula() -> None:
    values = torch.linspace(-1, 1, 7, dtype=torch.float64)
    optimizer = RMSpropTF([{"params": [values]}], lr=0.045, **OPTIONS)
    expected, square, momentum = values.clone(), torch.ones(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)

    for gradient in gradients(5, 7):
        values.grad = gradient.clone()
        optimizer.step()
        square = 0.9 * square + 0.1 * gradient**2
        momentum = 0.9 * momentum + 0.045 * gradient / torch.sqrt(square + 1.0)
        expected = expected - momentum

    torch.testing.assert_close(values, expected, rtol=0, atol=1e-15)


def test_rmsprop_equals_timms_with_weight_decay() -> None:
    ours = torch.linspace(-1, 1, 7, dtype=torch.float64)
    theirs = torch.nn.Parameter(ours.clone())
    optimizer = RMSpropTF([{"params": [ours]}], lr=0.1, weight_decay=0.01, **OPTIONS)
    reference = TimmRMSpropTF([theirs], lr=0.1, alpha=0.9, eps=1.0, momentum=0.9, weight_decay=0.01)

    for gradient in gradients(5, 7):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()

    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-14)


def test_rmsprop_equals_timms_formula_in_float32() -> None:
    """The formula of timm: the root of the average plus epsilon, and the rate inside the momentum buffer."""
    ours = torch.linspace(-1, 1, 1000)
    theirs, square, momentum = ours.clone(), torch.ones(1000), torch.zeros(1000)
    optimizer = RMSpropTF([{"params": [ours]}], lr=0.045, weight_decay=4e-5, **OPTIONS)

    for gradient in gradients(20, 1000):
        ours.grad = gradient.float()
        optimizer.step()
        decayed = gradient.float() + 4e-5 * theirs
        square = square + (decayed.pow(2) - square) * 0.1
        momentum = momentum * 0.9 + 0.045 * (decayed / (square + 1.0).sqrt())
        theirs = theirs - momentum

    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_adams_decay_goes_into_the_gradient_and_adamws_does_not() -> None:
    """Adam adds the decay to the gradient, so a step on decay alone is as long as the rate."""
    steps = {}
    for name in ("adam", "adamw"):
        decayed, plain = torch.full((16,), 2.0), torch.ones(16)
        optimizer = make_optimizer(name, decayed, plain, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        decayed.grad, plain.grad = torch.zeros(16), torch.zeros(16)
        optimizer.step()
        steps[name] = 2.0 - decayed

    torch.testing.assert_close(steps["adam"], torch.full((16,), 0.1), rtol=1e-5, atol=0)
    torch.testing.assert_close(steps["adamw"], torch.full((16,), 0.1 * 0.01 * 2.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rmsprop", OPTIONS),
        ("sgd", {"momentum": 0.9}),
        ("adam", {"betas": (0.9, 0.999), "eps": 1e-8}),
        ("adamw", {"betas": (0.9, 0.999), "eps": 1e-8}),
    ],
)
def test_weight_decay_reaches_one_of_the_two_buffers(name: str, options: dict) -> None:
    decayed, plain = torch.ones(16), torch.ones(16)
    optimizer = make_optimizer(name, decayed, plain, weight_decay=0.5, **options)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    decayed.grad, plain.grad = torch.zeros(16), torch.zeros(16)

    optimizer.step()

    assert (decayed < 1).all()
    assert (plain == 1).all()
