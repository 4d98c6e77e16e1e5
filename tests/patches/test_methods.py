"""Promises that every patch method keeps, tested on every small network that it fits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patches
from patches import Backbone, PatchedModel, PatchError
from tests.patches.helpers import bits, changed, images, network, small_backbone, train

OWNERS = ("scale_bias", "depthwise", "last_layer", "norm_statistics", "full")
SELECTION = (*OWNERS, "shared")
SIDE = ("dtl", "dtl_plus", "dtl_plus_star", "mist", "parasite")
COMBINATIONS = [
    *(("mobilenet_v2", method) for method in OWNERS),
    ("mobilenet_v2", "scale_bias+depthwise+last_layer"),
    ("mobilenet_v2", "norm_statistics+last_layer"),
    ("resnet18", "scale_bias"),
    ("vit_b_16", "scale_bias+last_layer"),
    *(("small_vit", method) for method in ("dtl", "dtl_plus", "dtl_plus_star", "mist")),
    *(("small_swin", method) for method in ("dtl", "dtl_plus", "dtl_plus_star")),
    ("resnet18", "parasite"),
    ("mobilenet_v2", "parasite"),
]
contract = pytest.mark.parametrize(("name", "method"), COMBINATIONS)
SIZE = {"mobilenet_v2": 16, "resnet18": 32, "vit_b_16": 32, "small_vit": 32, "small_swin": 32}
OPTIONS: dict[str, dict[str, Any]] = {"parasite": {"ratio": 0.25}}


def backbone_named(name: str) -> Backbone:
    return small_backbone() if name == "mobilenet_v2" else network(name)


def attach(backbone: Backbone, method: str, num_classes: int | None = None, *, seed: int = 0) -> PatchedModel:
    return patches.attach(backbone, method, num_classes, seed=seed, **OPTIONS.get(method, {}))


def frozen_features(backbone: Backbone, method: str, x: Tensor) -> Tensor:
    """Return the features that the method's readout makes of the frozen backbone alone."""
    if method == "mist":
        tokens = sum(backbone.run(x, 0, step + 1) for step in range(backbone.num_blocks + 1))
        return nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)[:, 0]
    if method.startswith("dtl") and backbone.name == "vit_b_16":
        return backbone.network.encoder.ln(backbone.run(x, 0, backbone.num_blocks + 1)[:, 1:].mean(1))
    return backbone.run(x, 0, -1)


def state_bits(module: nn.Module) -> dict[str, bytes]:
    return bits(module.state_dict())


@contract
def test_shared_and_private_partition_the_state(name: str, method: str) -> None:
    backbone = backbone_named(name)
    model = attach(backbone, method)
    own, shared = set(model.private_names), set(model.shared_names)
    assert own
    assert not own & shared
    assert own | shared == set(model.network.state_dict())
    side = {key for key in own if key.startswith("side.")}
    assert bool(side) == (method in SIDE)
    assert (own | shared) - side == set(backbone.network.state_dict())
    base = backbone.network.state_dict()
    storages = {tensor.untyped_storage().data_ptr() for tensor in base.values()}
    assert all(tensor.data_ptr() == base[key].data_ptr() for key, tensor in model.shared_state().items())
    assert all(tensor.untyped_storage().data_ptr() not in storages for tensor in model.private_state().values())


@contract
def test_a_fresh_patch_changes_no_feature(name: str, method: str) -> None:
    backbone = backbone_named(name)
    model, x = attach(backbone, method, 3), images(2, SIZE[name])
    identity = all(patches.methods()[part].identity_at_start for part in method.split("+"))
    assert identity == (method != "parasite")
    with torch.no_grad():
        expected = frozen_features(backbone, method, x)
        features = model.run(x, 0, -1)
        assert torch.equal(features[:, -expected.shape[1] :], expected)  # a parasite's own features come first
        assert (features.shape == expected.shape) == identity
        assert model(x).shape == (2, 3)
        assert torch.equal(model(x), model.run(x))
        with_own_head = attach(backbone, method)(x)
        logits = backbone.run(expected, len(backbone.steps) - 1)
        if identity:
            assert torch.equal(with_own_head, logits)
        else:  # the zero weights for the parasite's features make the head's sums longer, so the rounding differs
            torch.testing.assert_close(with_own_head, logits)


@contract
def test_training_moves_owned_tensors_and_no_other(name: str, method: str) -> None:
    backbone = backbone_named(name)
    model = attach(backbone, method, None)
    base, own = state_bits(backbone.network), state_bits(model.network)
    train(model, size=SIZE[name], count=4)
    assert changed(base, state_bits(backbone.network)) == set()
    moved = changed(own, state_bits(model.network))
    assert moved <= set(model.private_names)
    # Not every tensor can change: a β before a 1x1 convolution and a BatchNorm has no gradient. Every kind changes.
    assert {key.rpartition(".")[2] for key in moved} == {key.rpartition(".")[2] for key in model.private_names}
    assert all(parameter.grad is None and parameter.requires_grad for parameter in backbone.network.parameters())


@contract
def test_two_tasks_on_one_backbone_stay_apart_and_swap(name: str, method: str) -> None:
    backbone, x = backbone_named(name), images(4, SIZE[name], seed=5)
    model, other = attach(backbone, method, 3, seed=1), attach(backbone, method, 3, seed=1)
    if model.head != "fixed":
        assert torch.equal(model(x), other(x))
    untouched = state_bits(other)
    train(model, size=SIZE[name], count=4)
    assert changed(untouched, state_bits(other)) == set()
    with torch.no_grad():
        a, b = model(x), other(x)
        assert not torch.equal(a, b)
        kept_a, kept_b = (copy.deepcopy(m.private_state()) for m in (model, other))
        for state, expected in ((kept_b, b), (kept_a, a), (kept_b, b)):
            model.load_private_state(state)
            assert torch.equal(model(x), expected)


@contract
def test_a_saved_patch_loads_into_a_fresh_backbone(name: str, method: str, tmp_path: Path) -> None:
    backbone, x = backbone_named(name), images(4, SIZE[name], seed=5)
    model = attach(backbone, method, 3, seed=2)
    train(model, size=SIZE[name], count=4)
    patches.save_bundle(model, tmp_path / "task.patch", classes=["a", "b", "c"], preprocessing={})
    again = patches.load_bundle(tmp_path / "task.patch", backbone_named(name))
    assert state_bits(again) == state_bits(model)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@contract
def test_a_folded_patch_gives_the_same_outputs(name: str, method: str) -> None:
    model, x = attach(backbone_named(name), method, 3), images(4, SIZE[name], seed=5)
    assert all(patches.methods()[part].foldable for part in method.split("+")) == (method not in SIDE)
    if method in SIDE:
        with pytest.raises(PatchError, match=f"'{method}' cannot be folded"):
            patches.fold(model)
        return
    train(model, size=SIZE[name], count=4)
    with torch.no_grad():
        torch.testing.assert_close(patches.fold(model)(x), model(x), rtol=1e-5, atol=1e-5)


def test_methods_say_what_they_are() -> None:
    known = patches.methods()
    assert tuple(known) == (*SELECTION, *SIDE)
    facts = {name: (info.kind, info.foldable, info.identity_at_start) for name, info in known.items()}
    assert {facts[name] for name in SELECTION} == {("selection", True, True)}
    assert {facts[name] for name in SIDE[:-1]} == {("side", False, True)}
    assert facts["parasite"] == ("side", False, False)


# The three rows with a last layer in the paper's Table 6 must stay different from each other.


@pytest.mark.parametrize(
    ("method", "moving"),
    [
        ("last_layer", {"classifier"}),
        ("norm_statistics+last_layer", {"classifier", "running_mean", "running_var", "num_batches_tracked"}),
        (
            "scale_bias+last_layer",
            {"classifier", "running_mean", "running_var", "num_batches_tracked", "weight", "bias"},
        ),
    ],
)
def test_table_6(method: str, moving: set[str]) -> None:
    backbone = small_backbone()
    norms = set(backbone.batch_norms())
    model = patches.attach(backbone, method, 3)
    before = state_bits(model.network)
    train(model)
    kinds = set()
    for name in changed(before, state_bits(model.network)):
        path, _, kind = name.rpartition(".")
        kinds.add(kind if path in norms else name.split(".")[0])
    assert kinds == moving


def test_norm_statistics_follow_the_batch_with_the_layers_momentum() -> None:
    backbone = small_backbone(norm_momentum=0.25)
    model, x = patches.attach(backbone, "norm_statistics"), images(8, 16)
    norm, base = model.network.features[0][1], backbone.network.features[0][1]
    with torch.no_grad():
        z = backbone.network.features[0][0](x)
        model.train()(x)
    torch.testing.assert_close(norm.running_mean, 0.75 * base.running_mean + 0.25 * z.mean((0, 2, 3)))
    variance = z.transpose(0, 1).flatten(1).var(1, unbiased=True)
    torch.testing.assert_close(norm.running_var, 0.75 * base.running_var + 0.25 * variance)
    assert norm.num_batches_tracked == 1
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_source_statistics_stay_while_scale_and_bias_train() -> None:
    model, x = patches.attach(small_backbone(), "scale_bias", statistics="source"), images(8, 16)
    head = len(model.backbone.steps) - 1
    with torch.no_grad():
        assert torch.equal(model.train().run(x, 0, head), model.eval().run(x, 0, head))
    before = state_bits(model.network)
    model.set_shared_trainable(True)  # and back again: this must not unfreeze the private layers
    model.set_shared_trainable(False)
    train(model)
    moved = changed(before, state_bits(model.network))
    assert moved == {name for name in model.private_names if name.endswith(("weight", "bias"))}
    assert any(name.endswith("running_mean") for name in model.private_names)


@pytest.mark.parametrize(
    ("name", "method", "options", "message"),
    [
        ("resnet18", "depthwise", {}, "needs depthwise convolutions, and backbone 'resnet18' has none"),
        ("vit_b_16", "norm_statistics", {}, "needs BatchNorm layers"),
        ("vit_b_16", "scale_bias", {"statistics": "source"}, "about BatchNorm layers"),
        ("resnet18", "scale_bias", {"statistics": "sauce"}, "statistics='sauce'"),
        ("resnet18", "scale_bais", {}, "Unknown patch method 'scale_bais'. Did you mean 'scale_bias'?"),
        ("resnet18", "scale_bias+", {}, "Unknown patch method ''"),
        ("resnet18", "full+full", {}, "names 'full' twice"),
        ("resnet18", "scale_bias", {"statistic": "batch"}, "Did you mean 'statistics'?"),
        ("resnet18", "last_layer", {"statistics": "batch"}, "There are none to choose from"),
        ("resnet18", "last_layer", {"paths": ()}, "Unknown option"),
        ("resnet18", "last_layer", {"num_classes": 0}, "num_classes=0"),
        ("small_vit", "dtl+last_layer", {}, "Attach 'dtl' alone"),
        ("small_vit", "scale_bias+mist", {}, "Attach 'mist' alone"),
        ("resnet18", "dtl", {}, "defined on vit_b_16 and swin_b, and this backbone is 'resnet18'"),
        ("small_vit", "dtl", {"first_block": 0}, "first_block=0: use a whole number from 1 to 4"),
        ("small_vit", "dtl", {"first_block": 5}, "first_block=5"),
        ("small_vit", "dtl", {"rank": 0}, "rank=0: use a whole number of 1 or more"),
        ("small_vit", "dtl", {"rank": True}, "rank=True"),
        ("small_vit", "dtl", {"beta": 0}, "beta=0: use a number above 0"),
        ("small_vit", "dtl", {"beta": float("nan")}, "beta=nan"),
        ("small_vit", "dtl", {"theta": "no"}, "theta='no': use true or false"),
        ("small_vit", "dtl", {"readout": "mean"}, "readout='mean': use patch_mean or class_token"),
        ("small_swin", "dtl", {"readout": "class_token"}, "Swin has no class token"),
        ("small_vit", "dtl_plus", {"kernel_size": 0}, "kernel_size=0"),
        ("small_vit", "dtl", {"kernel_size": 3}, "Unknown option of patch method 'dtl' 'kernel_size'"),
        ("small_swin", "mist", {}, "defined on vit_b_16, and this backbone is 'swin_b'"),
        ("small_vit", "mist", {"k": 5}, "k=5: use a whole number from 0 to 4"),
        ("small_vit", "mist", {"layers": 0}, "layers=0"),
        ("small_vit", "mist", {"rank": 1.5}, "rank=1.5"),
        ("small_vit", "mist", {"block": "conv"}, "block='conv': use attention, mlp or depthwise"),
        ("small_vit", "mist", {"readout": "sum"}, "readout='sum': use class_token or mean"),
        ("small_vit", "mist", {"gather": 1}, "gather=1: use true or false"),
        ("small_vit", "mist", {"block": "depthwise", "readout": "class_token"}, "Use readout='mean'"),
        ("small_vit", "parasite", {"ratio": 0.2}, "needs a convolutional host in stages (resnet18, resnet50"),
        ("resnet18", "parasite", {}, "give one of the two"),
        ("resnet18", "parasite", {"ratio": 0.2, "target_percent": 2}, "give one of the two"),
        ("resnet18", "parasite", {"ratio": 0}, "ratio=0"),
        ("resnet18", "parasite", {"ratio": 1.1}, "ratio=1.1"),
        ("resnet18", "parasite", {"ratio": 0.01}, "has 64 channels, of which none would be left. Use 0.016 or more"),
        ("resnet18", "parasite", {"target_percent": 500}, "target_percent=500"),
        ("resnet18", "parasite", {"ratio": 0.2, "init": "zero"}, "init='zero': use slice or random"),
        ("resnet18", "parasite", {"ratio": 0.2, "join": "concat"}, "join='concat'"),
        ("resnet18", "parasite", {"ratio": 0.2, "zero_host": "yes"}, "zero_host='yes'"),
    ],
)
def test_what_cannot_be_attached(name: str, method: str, options: dict, message: str) -> None:
    with pytest.raises(PatchError) as error:
        patches.attach(network(name), method, **options)
    assert message in str(error.value)


def test_scale_bias_needs_a_normalisation_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backbone, "norm_layers", lambda _: {})
    with pytest.raises(PatchError, match="needs normalisation layers"):
        patches.attach(small_backbone(), "scale_bias")


def test_an_option_goes_to_the_one_method_that_declares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patches.attach(small_backbone(), "last_layer+scale_bias", statistics="source")
    assert model.options == {"statistics": "source"}
    assert patches.attach(small_backbone(), "last_layer+scale_bias").options == {"statistics": "batch"}
    monkeypatch.setitem(patches.patch.METHODS, "second", patches.patch.METHODS["scale_bias"])
    with pytest.raises(PatchError, match="declared by scale_bias and second"):
        patches.attach(small_backbone(), "scale_bias+second", statistics="batch")


def test_shared_is_the_backbone_itself_and_learns_with_it() -> None:
    backbone, x = small_backbone(), images(4, 16)
    model, other = patches.attach(backbone, "shared"), patches.attach(backbone, "shared")
    assert model.private_names == ()
    assert set(model.shared_names) == set(backbone.network.state_dict())
    assert model.head == "shared"
    model.set_shared_trainable(True)
    before = state_bits(backbone.network)
    train(model)
    assert changed(before, state_bits(backbone.network)) >= {"classifier.1.weight", "features.0.1.running_mean"}
    with torch.no_grad():
        expected = backbone.network.eval()(x)
        assert torch.equal(model(x), expected)
        assert torch.equal(other(x), expected)
        assert torch.equal(model.own_part(None, model.shared_part(x)), expected)
        torch.testing.assert_close(patches.fold(model)(x), expected, rtol=1e-5, atol=1e-5)


def test_shared_with_classes_of_its_own_has_a_fixed_head() -> None:
    backbone, x = small_backbone(), images(4, 16)
    model = patches.attach(backbone, "shared", 3, seed=2)
    assert (model.head, model.private_names) == ("fixed", ())
    assert torch.equal(model.own_part(None, model.shared_part(x)), model(x))
