"""DTL, DTL+ and DTL+*: exact counts, the paper's recursion, and the steps that tasks share."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patches
from patches import Backbone, PatchedModel
from tests.patches.helpers import images, randomise_side, small_transformer


def hollow(name: str) -> Backbone:
    with torch.device("meta"):
        return patches.load_backbone(name)


def body(model: PatchedModel) -> int:
    return sum(t.numel() for name, t in model.private_state().items() if name.startswith("side."))


@pytest.mark.parametrize(
    ("name", "method", "options", "expected"),
    [
        ("vit_b_16", "dtl", {}, 36_864),
        ("vit_b_16", "dtl", {"rank": 1}, 18_432),
        ("vit_b_16", "dtl", {"rank": 4}, 73_728),
        ("vit_b_16", "dtl", {"theta": False, "first_block": 11}, 36_864),
        ("swin_b", "dtl", {}, 90_112),
        ("vit_b_16", "dtl_plus", {"kernel_size": 3}, 43_776),
        ("vit_b_16", "dtl_plus", {"kernel_size": 4}, 49_152),
        ("vit_b_16", "dtl_plus", {"kernel_size": 5}, 56_064),
        ("swin_b", "dtl_plus", {}, 128_512),
        ("vit_b_16", "dtl_plus_star", {}, 56_064),
        ("swin_b", "dtl_plus_star", {}, 144_256),
    ],
)
def test_counts(name: str, method: str, options: dict, expected: int) -> None:
    model = patches.attach(hollow(name), method, 102, **options)
    assert body(model) == expected
    assert model.parameter_counts().trained == expected + 102 * (769 if name == "vit_b_16" else 1025)


@pytest.mark.parametrize(
    ("name", "method", "first_block", "reads"),
    [
        ("vit_b_16", "dtl", 7, range(8)),
        ("swin_b", "dtl", 15, range(4, 16)),  # collects from block 5 on
        ("vit_b_16", "dtl_plus_star", 1, range(2)),
        ("swin_b", "dtl_plus_star", 1, range(2)),
    ],
)
def test_the_papers_blocks_are_the_defaults(name: str, method: str, first_block: int, reads: range) -> None:
    model = patches.attach(hollow(name), method)
    assert (model.options["first_block"], model.reads) == (first_block, tuple(reads))
    assert model.first_private_block == first_block + 1
    assert (model.options["rank"], model.options["beta"]) == (2 if name == "vit_b_16" else 4, 100.0)


def test_a_fresh_patch_has_the_papers_values() -> None:
    backbone = patches.load_backbone(
        "vit_b_16", image_size=32, num_layers=2, hidden_dim=256, num_heads=2, mlp_dim=8, num_classes=5
    )
    state = patches.attach(backbone, "dtl_plus", 400, rank=64).private_state()
    a = state["side.blocks.1.a"]
    assert a.shape == (256, 64)
    assert a.abs().max() <= 1 / 16
    torch.testing.assert_close(a.std(), torch.tensor(1 / 16 / 3**0.5), rtol=0.02, atol=0)
    assert not any(state[f"side.blocks.{block}.c"].any() for block in (1, 2))
    assert not state["heads.head.bias"].any()
    weight = state["heads.head.weight"]
    torch.testing.assert_close(weight.std(), torch.tensor(0.02), rtol=0.02, atol=0)
    assert not torch.equal(a, state["side.blocks.2.a"])


# The paper's formulas, written independently of the code


def theta(x: Tensor, beta: float) -> Tensor:
    return x / (1 + torch.exp(-beta * x))


def depthwise_same(grid: Tensor, weight: Tensor) -> Tensor:
    """Convolve a grid (batch, height, width, d) with weight (d, 1, k, k), as a sum over the kernel's offsets."""
    size = weight.shape[-1]
    before = (size - 1) // 2
    batch, height, width, d = grid.shape
    padded = grid.new_zeros(batch, height + size, width + size, d)
    padded[:, before : before + height, before : before + width] = grid
    return sum(padded[:, u : u + height, v : v + width] * weight[:, 0, u, v] for u in range(size) for v in range(size))


def branch(model: PatchedModel, collected: Tensor, stage: int, class_tokens: int) -> Tensor:
    added = theta(collected, model.options["beta"]) if model.options["theta"] else collected
    if "kernel_size" not in model.options:
        return added
    weight = model.network.side.convolutions[str(stage)].weight
    if not class_tokens:
        return depthwise_same(added, weight)
    rows = added[:, 1:].reshape(len(added), 4, 4, -1)
    return torch.cat([added[:, :1], depthwise_same(rows, weight).reshape(len(added), 16, -1)], dim=1)


def vit_by_hand(model: PatchedModel, x: Tensor) -> Tensor:
    vit, blocks, first = model.backbone.network, model.network.side.blocks, model.options["first_block"]
    tokens = vit.conv_proj(x).flatten(2).transpose(1, 2)
    z = torch.cat([vit.class_token.expand(len(x), 1, -1), tokens], dim=1) + vit.encoder.pos_embedding
    h = torch.zeros_like(z)
    for index, block in enumerate(vit.encoder.layers, start=1):
        h = h + z @ blocks[str(index)].a @ blocks[str(index)].c
        z = block(z)
        if index >= first:
            z = z + branch(model, h, 1, class_tokens=1)
    if model.options["readout"] == "class_token":
        return model.network.heads.head(vit.encoder.ln(z)[:, 0])
    return model.network.heads.head(vit.encoder.ln(z[:, 1:].mean(1)))


def swin_by_hand(model: PatchedModel, x: Tensor) -> Tensor:
    swin, blocks, first = model.backbone.network, model.network.side.blocks, model.options["first_block"]
    z = swin.features[0](x)
    index = 0
    for part in swin.features[1:]:
        if not isinstance(part, nn.Sequential):
            z = part(z)
            continue
        h, stage = torch.zeros_like(z), index + 1
        for block in part:
            index += 1
            if str(index) in blocks:
                h = h + z @ blocks[str(index)].a @ blocks[str(index)].c
            z = block(z)
            if index >= first:
                z = z + branch(model, h, stage, class_tokens=0)
    return model.network.head(swin.norm(z).mean((1, 2)))


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("small_vit", "dtl", {}),
        ("small_vit", "dtl", {"theta": False, "readout": "class_token"}),
        ("small_vit", "dtl", {"first_block": 4, "rank": 3, "beta": 2.0}),
        ("small_vit", "dtl_plus", {"kernel_size": 3, "beta": 5.0}),
        ("small_vit", "dtl_plus", {"kernel_size": 4, "beta": 5.0}),
        ("small_vit", "dtl_plus_star", {"kernel_size": 2, "beta": 5.0}),
        ("small_swin", "dtl", {}),
        ("small_swin", "dtl", {"first_block": 4, "beta": 5.0}),
        ("small_swin", "dtl_plus", {"first_block": 5, "kernel_size": 4, "beta": 5.0}),
        ("small_swin", "dtl_plus_star", {"kernel_size": 3, "beta": 5.0}),
    ],
)
def test_the_recursion_is_the_papers(name: str, method: str, options: dict[str, Any]) -> None:
    backbone = small_transformer(name, torch.float64)
    model = randomise_side(patches.attach(backbone, method, 3, **options))
    x = images(2, 32, dtype=torch.float64)
    by_hand = vit_by_hand if name == "small_vit" else swin_by_hand
    with torch.no_grad():
        expected = by_hand(model, x)
        fresh = patches.attach(backbone, method, 3, **options)
        assert (by_hand(fresh, x) - expected).abs().max() > 1e-2  # the side network has an effect
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_the_gradient_is_that_of_the_paper_without_a_border() -> None:
    """Check that cutting the graph below block M changes no gradient of the task's own tensors."""
    backbone = small_transformer("small_vit", torch.float64)
    model = randomise_side(patches.attach(backbone, "dtl_plus", 3, kernel_size=4))
    x = images(2, 32, dtype=torch.float64)
    own = [tensor for tensor in model.private_state().values() if tensor.requires_grad]
    expected = torch.autograd.grad(vit_by_hand(model, x).square().sum(), own)
    found = torch.autograd.grad(model.train()(x).square().sum(), own)
    assert all(gradient.any() for gradient in found)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["small_vit", "small_swin"])
def test_the_readout_of_torchvision_gives_the_backbones_own_logits_at_the_start(name: str) -> None:
    backbone, x = small_transformer(name), images(2, 32)
    options = {"readout": "class_token"} if name == "small_vit" else {}
    with torch.no_grad():
        for method in ("dtl", "dtl_plus", "dtl_plus_star"):
            assert torch.equal(patches.attach(backbone, method, **options)(x), backbone.network(x))


def test_stochastic_depth_of_the_blocks_after_m_follows_train() -> None:
    backbone = small_transformer("small_swin", stochastic_depth_prob=0.9)
    model, x = patches.attach(backbone, "dtl", 3), images(8, 32)
    with torch.no_grad():
        eval_logits = model(x)
        torch.manual_seed(0)
        assert not torch.equal(model.train()(x), eval_logits)
        assert torch.equal(copy.deepcopy(model).eval()(x), eval_logits)
