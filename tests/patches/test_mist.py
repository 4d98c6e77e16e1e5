"""MIST: exact counts, the paper's formulas of the blocks, and training in two places, server and edge."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patches
from patches import PatchedModel, PatchError
from patches.methods.mist import Edge, Gather, candidates
from tests.patches.helpers import bits, images, network, randomise_side, small_transformer


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 399_360),
        ({"layers": 8}, 798_720),
        ({"rank": 16}, 202_752),
        ({"block": "mlp"}, 399_360),
        ({"block": "mlp", "layers": 8}, 798_720),
        ({"block": "depthwise"}, 33_792),
        ({"block": "depthwise", "layers": 8}, 67_584),
        ({"k": 4, "gather": False, "readout": "mean"}, 399_360),
    ],
)
def test_counts(options: dict, expected: int) -> None:
    with torch.device("meta"):
        backbone = patches.load_backbone("vit_b_16")
    model = patches.attach(backbone, "mist", 102, **options)
    assert sum(t.numel() for name, t in model.private_state().items() if name.startswith("side.")) == expected
    assert model.parameter_counts().trained == expected + 769 * 102


def test_the_message_of_one_image_takes_605_184_bytes() -> None:
    with torch.device("meta"):
        backbone = patches.load_backbone("vit_b_16")
        message = Gather(backbone)(torch.empty(1, 3, 224, 224))
    assert (tuple(message.shape), message.nbytes, message.half().nbytes) == ((1, 197, 768), 605_184, 302_592)


@pytest.mark.parametrize(("blocks", "expected"), [(12, (4, 8, 12)), (4, (1, 3, 4)), (1, (1,))])
def test_candidates_end_with_all_blocks(blocks: int, expected: tuple) -> None:
    assert candidates(blocks) == expected


# The paper's formulas, written independently of the code


def layer_norm(x: Tensor, weight: Tensor | float = 1.0, bias: Tensor | float = 0.0) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def by_hand(model: PatchedModel, x: Tensor) -> Tensor:
    options, state = model.options, model.private_state()
    outputs = [model.backbone.run(x, 0, step + 1) for step in range(options["k"] + 1)]
    u = torch.stack(outputs).sum(0) if options["gather"] else outputs[-1]
    for layer in range(options["layers"]):
        path = f"side.blocks.{layer}"
        y = layer_norm(u, state[f"{path}.norm.weight"], state[f"{path}.norm.bias"])
        if options["block"] == "attention":
            query, key, value = (
                y @ w.T for w in state[f"{path}.function.query_key_value.weight"].split(options["rank"])
            )
            scores = torch.exp(query @ key.transpose(1, 2) / options["rank"] ** 0.5)
            mixed = (scores / scores.sum(-1, keepdim=True)) @ value
            u = u + mixed @ state[f"{path}.function.out.weight"].T
        elif options["block"] == "mlp":
            hidden = y @ state[f"{path}.function.down.weight"].T
            assert hidden.shape[-1] == 2 * options["rank"]
            u = u + (hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))) @ state[f"{path}.function.up.weight"].T
        else:
            weight, rows = state[f"{path}.function.convolution.weight"], y[:, 1:].reshape(len(y), 4, 4, -1)
            added = torch.zeros_like(rows)
            for i in range(4):
                for j in range(4):
                    for di in range(max(0, i - 1), min(4, i + 2)):
                        for dj in range(max(0, j - 1), min(4, j + 2)):
                            added[:, i, j] += rows[:, di, dj] * weight[:, 0, di - i + 1, dj - j + 1]
            u = torch.cat([u[:, :1], u[:, 1:] + added.reshape(len(y), 16, -1)], dim=1)
    u = layer_norm(u)
    features = u[:, 0] if options["readout"] == "class_token" else u[:, 1:].mean(1)
    return features @ state["heads.head.weight"].T + state["heads.head.bias"]


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 3},
        {"rank": 3, "k": 2, "readout": "mean", "layers": 2},
        {"rank": 3, "k": 3, "gather": False},
        {"rank": 3, "block": "mlp", "k": 0},
        {"block": "depthwise"},
    ],
)
def test_the_edge_network_is_the_papers(options: dict[str, Any]) -> None:
    backbone = small_transformer("small_vit", torch.float64)
    model = randomise_side(patches.attach(backbone, "mist", 3, **options))
    x = images(2, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = by_hand(model, x)
        assert (by_hand(patches.attach(backbone, "mist", 3, **options), x) - expected).abs().max() > 1e-3
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", ["attention", "mlp", "depthwise"])
def test_fresh_blocks_change_no_bit_of_what_was_gathered(block: str) -> None:
    backbone, x = small_transformer("small_vit"), images(2, 32)
    model = patches.attach(backbone, "mist", 3, block=block)
    gathered = Gather(backbone)(x)
    with torch.no_grad():
        assert torch.equal(model.network.side.blocks(gathered), gathered)
        assert not torch.equal(randomise_side(model).network.side.blocks(gathered), gathered)


# Training in two places, server and edge


def test_gathered_maps_are_sums_of_the_frozen_backbones_outputs() -> None:
    backbone, x = small_transformer("small_vit"), images(3, 32)
    with torch.no_grad():
        outputs = [backbone.run(x, 0, step + 1) for step in range(5)]
    for module in backbone.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    backbone.network.train()
    gather = Gather(backbone)
    sums = gather.candidates(x, (1, 3, 4))
    assert list(sums) == [1, 3, 4]
    for k, gathered in sums.items():
        torch.testing.assert_close(gathered, torch.stack(outputs[: k + 1]).sum(0))
        assert torch.equal(gather(x, k), gathered)
        assert not gathered.requires_grad
    assert torch.equal(gather(x), sums[4])
    with pytest.raises(PatchError, match="k=5"):
        gather(x, 5)
    with pytest.raises(PatchError, match="defined on vit_b_16"):
        Gather(network("resnet18"))


@pytest.mark.parametrize("options", [{}, {"k": 2, "block": "mlp"}, {"block": "depthwise", "layers": 2}])
def test_an_edge_network_trained_on_gathered_maps_is_the_full_models_patch(tmp_path: Path, options: dict) -> None:
    backbone, x = small_transformer("small_vit"), images(6, 32)
    stored = Gather(backbone)(x, options.get("k"))
    edge = Edge(backbone.identity(), 3, seed=4, **options)
    model = patches.attach(backbone, "mist", 3, seed=4, **options)
    assert bits(edge.private_state()) == bits(model.private_state())

    optimizer = torch.optim.Adam(edge.parameters(), 0.01)
    labels = torch.arange(6) % 3
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(edge(stored), labels).backward()
        optimizer.step()
    patches.save_bundle(edge, tmp_path / "edge.patch", classes=["a", "b", "c"], preprocessing={})

    loaded = patches.load_bundle(tmp_path / "edge.patch", backbone)
    assert loaded.options == model.options
    assert bits(loaded.private_state()) == bits(edge.private_state())
    with torch.no_grad():
        assert not torch.equal(loaded(x), model(x))
        assert torch.equal(loaded(x), edge(stored))
        torch.testing.assert_close(edge(stored.half()), edge(stored), rtol=0.05, atol=0.05)


def test_an_edge_network_says_what_it_cannot_be_made_of() -> None:
    identity = small_transformer("small_vit").identity()
    with pytest.raises(PatchError, match="k=9"):
        Edge(identity, 3, k=9)
    with pytest.raises(PatchError, match="defined on vit_b_16"):
        Edge({**identity, "name": "swin_b"}, 3)


def test_an_edge_network_makes_a_bundle_without_a_backbone(tmp_path: Path) -> None:
    """What its process imports is in test_features.py."""
    edge = Edge(small_transformer("small_vit").identity(), 2)
    edge(torch.randn(2, 17, 16)).sum().backward()
    patches.save_bundle(edge, tmp_path / "edge.patch", classes=["a", "b"], preprocessing={})
    patches.verify_bundle(tmp_path / "edge.patch", small_transformer("small_vit"))
