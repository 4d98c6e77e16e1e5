"""Folding: the plain torchvision network gives the same outputs."""

import pytest
import torch
import torchvision
from torch import nn

import patches
from patches import PatchError
from tests.patches.helpers import NETWORKS, images, network, randomised, small_backbone, train


def test_folding_is_the_papers_formula_in_float64() -> None:
    model = patches.attach(small_backbone(torch.float64), "scale_bias")
    conv, norm = model.network.features[0][0], model.network.features[0][1]
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    folded = patches.fold(model).features[0][0]
    torch.testing.assert_close(folded.weight, conv.weight * factor[:, None, None, None], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(folded.bias, norm.bias - norm.running_mean * factor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("method", ["scale_bias", "scale_bias+depthwise+last_layer", "last_layer"])
def test_a_trained_patch_folds_within_float_tolerance(dtype: torch.dtype, tolerance: float, method: str) -> None:
    model = patches.attach(small_backbone(), method, 3)
    train(model)
    exact = patches.attach(small_backbone(dtype), method, 3)
    exact.load_private_state(
        {name: tensor.to(exact.private_state()[name]) for name, tensor in model.private_state().items()}
    )
    x = images(8, 16, dtype=dtype)
    with torch.no_grad():
        expected = exact(x)
        assert expected.std() > 0.01
        torch.testing.assert_close(patches.fold(exact)(x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("mobilenet_v2", "resnet50")])
def test_every_network_folds(name: str) -> None:
    model, x = patches.attach(network(name), "scale_bias+last_layer", 4), images(2, NETWORKS[name][1])
    plain = patches.fold(model)
    assert type(plain) is type(network(name).network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert not any(module.training for module in plain.modules())
    with torch.no_grad():
        expected = model(x)
        scale = expected.abs().max()
        torch.testing.assert_close(plain(x) / scale, expected / scale, rtol=1e-5, atol=1e-5)


def test_resnet50_folds_in_float64() -> None:
    backbone = randomised(patches.load_backbone("resnet50", num_classes=4)).to(torch.float64)
    model, x = patches.attach(backbone, "scale_bias"), images(2, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(patches.fold(model)(x), expected, rtol=1e-10, atol=1e-10)


def test_a_folded_network_stands_alone_and_a_fixed_head_becomes_an_ordinary_one() -> None:
    model, x = patches.attach(small_backbone(), "scale_bias", 3), images(2, 16)
    plain = patches.fold(model)
    assert type(plain.classifier[1]) is nn.Linear
    assert "classifier.1.weight" in plain.state_dict()
    own = {tensor.untyped_storage().data_ptr() for tensor in plain.state_dict().values()}
    with torch.no_grad():
        before = plain(x)
        for tensor in (*model.parameters(), *model.buffers()):
            assert tensor.untyped_storage().data_ptr() not in own
            tensor.zero_()
        assert torch.equal(plain(x), before)


def test_a_folded_vit_loads_into_torchvisions_own_class() -> None:
    model, x = patches.attach(network("vit_b_16"), "scale_bias+last_layer", 4), images(1, 32)
    own = torchvision.models.vit_b_16(image_size=32, num_classes=4).eval()
    own.load_state_dict(patches.fold(model).state_dict())
    with torch.no_grad():
        assert torch.equal(own(x), model(x))


def test_a_method_that_cannot_be_folded_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patches.attach(small_backbone(), "last_layer+scale_bias")
    monkeypatch.setattr(patches.patch.METHODS["scale_bias"], "foldable", False)
    with pytest.raises(PatchError, match="'scale_bias' cannot be folded"):
        patches.fold(model)


# The toy example of the paper's section 3: biases alone decide how many times a network folds its input space.


def _tent_layer(bias: float) -> nn.Module:
    """q(x; b) = 2 ReLU(ReLU(x + b0) - ReLU(2x - 1 + b1) + b2), with b0 = bias and b1 = b2 = 0."""
    hidden, output = nn.Linear(1, 2), nn.Linear(2, 1)
    hidden.weight.data = torch.tensor([[1.0], [2.0]])
    hidden.bias.data = torch.tensor([bias, -1.0])
    output.weight.data = torch.tensor([[1.0, -1.0]])
    output.bias.data.zero_()
    last = nn.Linear(1, 1)
    last.weight.data.fill_(2.0)
    last.bias.data.zero_()
    return nn.Sequential(hidden, nn.ReLU(), output, nn.ReLU(), last)


def _components(bias: float, slack: float = 1e-9) -> int:
    """Count the connected parts of {x: 0.2 <= F(x) <= 0.4} on a grid that contains the fold at x = 0.5."""
    network = nn.Sequential(_tent_layer(bias), _tent_layer(0.0)).double()
    network[0][0].bias.data[0] = bias  # not through float32
    x = torch.arange(-4_000, 12_001, dtype=torch.float64) / 8_000
    with torch.no_grad():
        y = network(x[:, None])[:, 0]
    inside = ((y >= 0.2 - slack) & (y <= 0.4 + slack)).int()
    return int(inside[0] + (inside.diff() == 1).sum())


@pytest.mark.parametrize(
    ("bias", "parts"),
    [
        *((0.0, 4), (-0.075, 3), (-0.125, 2), (-0.425, 1), (-0.5, 0)),
        # Either side of each border. At -0.1 itself a single point is left, which the paper does not count.
        *((-0.049, 4), (-0.05, 3), (-0.099, 3), (-0.101, 2), (-0.399, 2), (-0.4, 1), (-0.449, 1), (-0.45, 1)),
        (-0.451, 0),
    ],
)
def test_biases_alone_choose_the_number_of_components(bias: float, parts: int) -> None:
    assert _components(bias) == parts
