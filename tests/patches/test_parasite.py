"""Parasite: exact counts, slices of the host, the activations that join it, and ratio 1, which is the host itself."""

import copy

import pytest
import torch
from torch import nn

import patches
from patches import Backbone, PatchedModel
from tests.patches.helpers import images, network, randomise_side, small_backbone

BODIES = {
    0.02: 77_431,
    0.03: 122_835,
    0.04: 174_384,
    0.05: 229_614,
    0.06: 289_427,
    0.07: 352_456,
    0.08: 423_310,
    0.09: 504_616,
    0.1: 579_881,
    0.2: 1_631_885,
    0.3: 3_145_502,
    0.4: 5_135_114,
    0.5: 7_623_200,
    0.6: 10_522_505,
    0.7: 13_922_477,
    0.8: 17_769_342,
    0.9: 22_106_922,
    1.0: 26_969_152,
}
"""Values of the paper's 18 models on ResNet-50."""


@pytest.fixture(scope="module")
def hollow() -> Backbone:
    with torch.device("meta"):
        return patches.load_backbone("resnet50")


@pytest.mark.parametrize(("ratio", "expected"), BODIES.items())
def test_counts(hollow: Backbone, ratio: float, expected: int) -> None:
    model = patches.attach(hollow, "parasite", 102, ratio=ratio)
    body = [t for name, t in model.private_state().items() if name.startswith("side.") and isinstance(t, nn.Parameter)]
    assert sum(tensor.numel() for tensor in body) == expected
    width = int(2048 * ratio + 1e-9)
    assert model.network.fc.in_features == width + 2048
    assert model.parameter_counts().trained == expected + (width + 2049) * 102


@pytest.mark.parametrize(("ratio", "expected"), [(0.09, 732_382), (0.2, 1_882_601), (1.0, 27_387_046)])
def test_counts_with_the_head_of_flowers(hollow: Backbone, ratio: float, expected: int) -> None:
    assert patches.attach(hollow, "parasite", 102, ratio=ratio).parameter_counts().trained == expected


def test_counts_of_the_ablations(hollow: Backbone) -> None:
    counts = {
        option: patches.attach(hollow, "parasite", 102, ratio=0.09, **{option: value}).parameter_counts().trained
        for option, value in (("init", "random"), ("zero_host", True), ("join", "add"))
    }
    assert counts["init"] == counts["zero_host"] == 732_382
    assert counts["join"] < 732_382 - 102 * 2048  # no wider convolutions, no host in the head


@pytest.mark.parametrize(("percent", "ratio"), [(2.61, 0.09), (7.44, 0.2)])
def test_a_target_percent_finds_the_papers_ratio(hollow: Backbone, percent: float, ratio: float) -> None:
    # The paper's percentages are means over six data sets, which have 50 1/3 classes on average.
    model = patches.attach(hollow, "parasite", 50, target_percent=percent)
    assert model.options["ratio"] == ratio
    assert model.options["target_percent"] is None
    assert patches.attach(hollow, "parasite", 50, **model.options).parameter_counts() == model.parameter_counts()


def state(model: PatchedModel) -> dict[str, torch.Tensor]:
    return {name.removeprefix("side.body."): tensor.detach() for name, tensor in model.private_state().items()}


def test_a_fresh_parasite_is_a_slice_of_its_host() -> None:
    backbone = network("resnet18")
    host, own = backbone.network.state_dict(), state(patches.attach(backbone, "parasite", 3, ratio=0.3))
    assert own["conv1.weight"].shape == (19, 3, 7, 7)
    assert torch.equal(own["conv1.weight"], host["conv1.weight"][:19])
    for kind in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(own[f"bn1.{kind}"], host[f"bn1.{kind}"][:19])
    # The first block of a stage reads the parasite's channels and then all of the host's. Other blocks read the
    # parasite's channels only.
    assert torch.equal(own["layer2.1.conv1.weight"], host["layer2.1.conv1.weight"][:38, :38])
    for path in ("layer2.0.conv1", "layer2.0.downsample.0"):
        weight = host[f"{path}.weight"]
        assert own[f"{path}.weight"].shape[1] == 19 + 64
        assert torch.equal(own[f"{path}.weight"], torch.cat([weight[:38, :19], weight[:38]], dim=1))
    # The identity of the first block has become a convolution.
    identity = torch.eye(64)[:19, :, None, None]
    assert torch.equal(own["layer1.0.downsample.weight"], torch.cat([identity[:, :19], identity], dim=1))
    assert "layer1.1.downsample.weight" not in own
    random = state(patches.attach(backbone, "parasite", 3, ratio=0.3, init="random"))
    assert {name: t.shape for name, t in random.items()} == {name: t.shape for name, t in own.items()}
    assert not torch.equal(random["conv1.weight"], own["conv1.weight"])
    assert random["bn1.weight"].eq(1).all()


def test_a_depthwise_convolution_keeps_the_channels_it_reads() -> None:
    backbone = small_backbone()
    host, own = backbone.network.state_dict(), state(patches.attach(backbone, "parasite", 3, ratio=0.25))
    # Block 1 of MobileNetV2 begins with a depthwise convolution, over the parasite's 8 channels and the host's 32.
    weight = host["features.1.conv.0.0.weight"]
    assert torch.equal(own["features.1.conv.0.0.weight"], torch.cat([weight[:8], weight]))
    projection = host["features.1.conv.1.weight"]
    assert torch.equal(own["features.1.conv.1.weight"], torch.cat([projection[:2, :8], projection[:2]], dim=1))


def without_host(backbone: Backbone) -> PatchedModel:
    """Return the parasite of ratio 1, with zero weights for all channels of the host."""
    model = patches.attach(backbone, "parasite", ratio=1.0)
    host = backbone.network.state_dict()
    widened = 0
    for path, tensor in state(model).items():
        own_columns = host[path].shape[1] if path in host and host[path].dim() == 4 else 64
        if tensor.dim() == 4 and tensor.shape[1] > own_columns:
            tensor[:, own_columns:] = 0
            widened += 1
    assert widened == {"resnet18": 8, "resnet50": 8, "mobilenet_v2": 3}[backbone.name]
    return model


def in_two_sums(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Convolve with the sum over the zeroed host kept separate, because one longer sum would be rounded differently."""

    def convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        return nn.functional.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    weight = layer.weight
    used = weight.transpose(0, 1).flatten(1).any(1).nonzero().max().item() + 1
    if layer.groups > 1 or used == weight.shape[1]:
        return convolve(x, weight)
    return convolve(x[:, :used], weight[:, :used]) + convolve(x[:, used:], weight[:, used:])


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_at_ratio_1_without_the_host_it_is_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = small_backbone() if name == "mobilenet_v2" else copy.deepcopy(network(name))
    x = images(2, 32)
    model = without_host(backbone)
    with torch.no_grad():
        expected = backbone.run(x, 0, -1)
        width = expected.shape[1]
        assert expected.std() > 1e-3
        tolerance = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(model.run(x, 0, -1)[:, :width], expected, rtol=0, atol=tolerance)
        monkeypatch.setattr(nn.Conv2d, "forward", in_two_sums)
        assert torch.equal(model.run(x, 0, -1)[:, :width], backbone.run(x, 0, -1))


def test_without_its_columns_of_the_head_a_parasite_is_a_linear_probe() -> None:
    backbone, x = network("resnet18"), images(2, 32)
    model = randomise_side(patches.attach(backbone, "parasite", ratio=0.3))
    with torch.no_grad():
        expected = backbone.network(x)
        torch.testing.assert_close(model(x), expected)
        model.network.fc.weight[:, :153].fill_(0.1)  # floor(512 * 0.3) columns are the parasite's
        assert (model(x) - expected).abs().max() > 0.1
        model.network.fc.weight[:, :153].zero_()
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("zero_host", [False, True])
@pytest.mark.parametrize("join", ["concatenate", "add"])
def test_every_stage_and_the_pool_read_the_host_unless_it_is_zeroed(zero_host: bool, join: str) -> None:
    backbone, x = network("resnet18"), images(2, 32)
    model = patches.attach(backbone, "parasite", 3, ratio=0.3, zero_host=zero_host, join=join)
    assert model.reads == (0, 2, 4, 6, 9)
    with torch.no_grad():
        outputs = dict(backbone.outputs(x, model.reads))
        expected = model.own_part(x, outputs)
        for step, output in outputs.items():
            unlike = model.own_part(x, {**outputs, step: output + 1})
            assert torch.equal(unlike, expected) == zero_host, step
        assert torch.equal(model(x), expected)
        if zero_host:
            assert torch.equal(expected, model.own_part(x, {step: 0 * output for step, output in outputs.items()}))


def test_added_channels_are_the_hosts_first() -> None:
    backbone, x = network("resnet18"), images(2, 32)
    model = patches.attach(backbone, "parasite", 3, ratio=0.3, join="add")
    with torch.no_grad():
        outputs = dict(backbone.outputs(x, model.reads))
        features = model.run(x, 0, -1)
        assert features.shape == (2, 153)
        shifted = {**outputs, 9: outputs[9] + torch.arange(512)}
        assert torch.allclose(
            model.network.side(model.as_backbone(), x, shifted), features + torch.arange(153), rtol=1e-5, atol=1e-4
        )


def test_its_batch_norms_learn_and_the_hosts_do_not() -> None:
    model = patches.attach(network("resnet18"), "parasite", 3, ratio=0.1).train()
    before = {name: norm.running_mean.clone() for name, norm in norms(model).items()}
    model(images(4, 32))
    moved = {name for name, norm in norms(model).items() if not torch.equal(norm.running_mean, before[name])}
    assert moved == {name for name in before if name.startswith("side.")}
    assert len(before) == 2 * len(moved) == 40


def norms(model: PatchedModel) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in model.network.named_modules() if isinstance(module, nn.BatchNorm2d)}
