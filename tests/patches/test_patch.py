"""Promises of a patched model with any method: aliasing, freezing, heads, counts, refusals."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import patches
from patches import PatchedModel, PatchError
from patches.layers import draw_linear
from tests.patches.helpers import bits, changed, images, network, small_backbone, train


@pytest.mark.parametrize(
    ("name", "method", "trained", "stored"),
    [
        ("mobilenet_v2", "scale_bias", 34_112, 68_224),
        ("mobilenet_v2", "depthwise", 64_224, 64_224),
        ("mobilenet_v2", "scale_bias+depthwise", 98_336, 98_336 + 34_112),
        ("mobilenet_v2", "norm_statistics", 0, 34_112),
        ("mobilenet_v2", "last_layer", 1_281_000, 1_281_000),
        ("mobilenet_v2", "scale_bias+last_layer", 34_112 + 1_281_000, 68_224 + 1_281_000),
        ("mobilenet_v2", "full", 3_504_872, 3_504_872 + 34_112),
        ("mobilenet_v2", "shared", 0, 0),
        ("inception_v3", "scale_bias", 36_224, 72_448),
        ("resnet50", "scale_bias", 53_120, 106_240),
        ("vit_b_16", "scale_bias", 25 * 2 * 768, 25 * 2 * 768),
    ],
)
def test_counts(name: str, method: str, trained: int, stored: int) -> None:
    assert patches.attach(network(name), method).parameter_counts() == patches.ParameterCounts(trained, stored)


@pytest.mark.parametrize(("classes", "expected"), [(102, 208_998), (196, 401_604), (100, 204_900)])
def test_counts_of_inception_with_and_without_its_auxiliary_branch(classes: int, expected: int) -> None:
    head = patches.attach(network("inception_v3"), "last_layer", classes)
    assert head.parameter_counts(include_auxiliary=False).trained == expected
    assert head.parameter_counts().trained == expected + 769 * classes
    scale_bias = patches.attach(network("inception_v3"), "scale_bias")
    assert scale_bias.parameter_counts(include_auxiliary=False) == patches.ParameterCounts(34_432, 68_864)


def test_twenty_patches_cost_twenty_patches_of_memory() -> None:
    backbone = network("mobilenet_v2")
    models = [patches.attach(backbone, "scale_bias") for _ in range(20)]

    def storages(modules: list[nn.Module]) -> dict[int, int]:
        tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    base = sum(storages([backbone.network]).values())
    patch = 4 * 68_224 + 8 * 52  # floats, and the 52 batch counters
    assert base == 4 * (3_504_872 + 34_112) + 8 * 52
    assert sum(storages([backbone.network, *models]).values()) == base + 20 * patch


def test_shared_tensors_are_aliases_with_parameter_objects_of_their_own() -> None:
    backbone = small_backbone()
    model = patches.attach(backbone, "scale_bias")
    base = backbone.network.state_dict(keep_vars=True)
    for name, tensor in model.shared_state().items():
        assert tensor is not base[name]
        assert not tensor.requires_grad
        assert base[name].requires_grad
        base[name].data.add_(1)
        assert torch.equal(tensor, base[name])
    model.set_shared_trainable(True)
    model(images(2, 16)).sum().backward()
    assert all(tensor.grad is not None for tensor in model.shared_state().values())
    assert all(tensor.grad is None for tensor in base.values())


def test_a_tensor_can_be_pointed_at_a_view_of_a_flat_buffer() -> None:
    model, x = patches.attach(small_backbone(), "scale_bias+last_layer", 3), images(2, 16)
    with torch.no_grad():
        expected = model(x)
        flat = torch.cat([t.detach().flatten() for t in model.private_state().values() if t.is_floating_point()])
        start = 0
        for tensor in model.private_state().values():
            if tensor.is_floating_point():
                tensor.data = flat[start : start + tensor.numel()].view_as(tensor)
                start += tensor.numel()
        torch.testing.assert_close(model(x), expected)
        flat.zero_()
        assert not model(x).any()


# Frozen and joint training


def _whole(model: PatchedModel) -> list[nn.Module]:
    return [model]


def _network(model: PatchedModel) -> list[nn.Module]:
    return [model.network]


def _submodules(model: PatchedModel) -> list[nn.Module]:
    return [module for module in model.modules() if module is not model]


def _bottom_up(model: PatchedModel) -> list[nn.Module]:
    return list(model.modules())[::-1]


@pytest.mark.parametrize("callees", [_whole, _network, _submodules, _bottom_up])
@pytest.mark.parametrize("method", ["last_layer", "depthwise", "depthwise+last_layer", "scale_bias"])
@pytest.mark.parametrize("clone", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_frozen_backbone_stays_bit_identical(
    callees: Callable[[PatchedModel], list[nn.Module]],
    method: str,
    clone: Callable[[PatchedModel], PatchedModel],
) -> None:
    model = clone(patches.attach(small_backbone(), method, 3))
    before = model.backbone.content_hash()
    for _ in range(2):
        for module in callees(model):
            module.train()
        assert model.network.classifier[0].training  # dropout follows `train()`
        model(images(8, 16)).square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    assert model.backbone.content_hash() == before


def test_joint_training_moves_shared_tensors_for_every_task_and_stops_when_told() -> None:
    backbone = small_backbone()
    model, other = patches.attach(backbone, "last_layer", 3), patches.attach(backbone, "scale_bias+last_layer", 4)
    assert not model.shared_trainable
    model.set_shared_trainable(True)
    before, others_own = bits(dict(backbone.network.state_dict())), bits(other.private_state())
    train(model)
    moved = changed(before, bits(dict(backbone.network.state_dict())))
    assert {"features.0.0.weight", "features.0.1.weight", "features.0.1.running_mean"} <= moved
    assert not any(name.startswith("classifier") for name in moved)
    assert torch.equal(other.network.features[0][0].weight, backbone.network.features[0][0].weight)
    assert changed(others_own, bits(other.private_state())) == set()
    model.train()
    model.set_shared_trainable(False)
    assert not any(norm.training for norm in model.network.modules() if isinstance(norm, nn.BatchNorm2d))
    model.set_shared_trainable(True)
    assert all(norm.training for norm in model.network.modules() if isinstance(norm, nn.BatchNorm2d))


def test_attach_gives_a_model_in_eval_mode_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    backbone = small_backbone()
    backbone.network.train()
    model = patches.attach(backbone, "scale_bias", 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert backbone.network.training


# Heads


def test_a_fixed_head_is_random_frozen_and_outside_the_state() -> None:
    model = patches.attach(small_backbone(), "scale_bias", 3, seed=4)
    assert (model.head, model.num_classes) == ("fixed", 3)
    assert not any("classifier" in name for name in (*model.state_dict(), *model.private_names, *model.shared_names))
    weight, bias = draw_linear(32, 3, torch.Generator().manual_seed(4))
    head = model.network.classifier[1]
    assert torch.equal(head.weight, weight)
    assert torch.equal(head.bias, bias)
    train(model)
    assert torch.equal(head.weight, weight)
    assert model.fixed_head is not None
    assert model.fixed_head["seed"] == 4
    hashes = {
        patches.attach(small_backbone(dtype), "scale_bias", classes, seed=seed).fixed_head["sha256"]  # type: ignore[index]
        for dtype, classes, seed in [
            (torch.float32, 3, 4),
            (torch.float32, 3, 5),
            (torch.float32, 4, 4),
            (torch.float64, 3, 4),
        ]
    }
    assert len(hashes) == 4
    assert model.fixed_head["sha256"] in hashes


@pytest.mark.parametrize("method", ["scale_bias", "last_layer"])
def test_inception_gets_two_fresh_heads(method: str) -> None:
    model = patches.attach(network("inception_v3"), method, 7)
    heads = model.as_backbone().heads()
    assert {path: tuple(layer.weight.shape) for path, layer in heads.items()} == {
        "fc": (7, 2048),
        "AuxLogits.fc": (7, 768),
    }
    assert ("AuxLogits.fc.weight" in model.private_names) == (method == "last_layer")
    assert (model.fixed_head is None) == (method == "last_layer")


def test_without_num_classes_the_head_is_the_backbones() -> None:
    backbone = small_backbone()
    shared, private = patches.attach(backbone, "scale_bias"), patches.attach(backbone, "last_layer")
    assert (shared.head, private.head, shared.num_classes, private.num_classes) == ("shared", "private", 5, 5)
    assert shared.fixed_head is private.fixed_head is None
    base = backbone.network.classifier[1].weight
    assert torch.equal(private.network.classifier[1].weight, base)
    assert shared.network.classifier[1].weight.data_ptr() == base.data_ptr()
    assert private.network.classifier[1].weight.data_ptr() != base.data_ptr()


def test_a_fresh_private_head_comes_from_its_seed() -> None:
    heads = [patches.attach(small_backbone(), "last_layer", 5, seed=seed).private_state() for seed in (1, 1, 2)]
    assert bits(heads[0]) == bits(heads[1]) != bits(heads[2])


@pytest.mark.parametrize("name", ["vit_b_16", "swin_b"])
def test_the_network_knows_its_new_number_of_classes(name: str) -> None:
    model = patches.attach(network(name), "last_layer", 9)
    assert model.network.num_classes == 9
    assert network(name).network.num_classes == 1000


@pytest.mark.parametrize(
    ("name", "method", "step"),
    [
        ("mobilenet_v2", "scale_bias", "stem"),
        ("mobilenet_v2", "depthwise", "block1"),
        ("mobilenet_v2", "last_layer", "head"),
        ("inception_v3", "last_layer", "head"),
        ("vit_b_16", "scale_bias", "block1"),
        ("vit_b_16", "full", "stem"),
        ("swin_b", "scale_bias", "stem"),
    ],
)
def test_first_private_block(name: str, method: str, step: str) -> None:
    backbone = network(name)
    assert patches.attach(backbone, method).first_private_block == backbone.steps.index(step)


# Loading and refusing


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("classifier.1.bias"), "'classifier.1.bias': expected shape [3] float32, found none"),
        (lambda s: s.update(extra=torch.zeros(2)), "'extra': expected none, found shape [2] float32"),
        (lambda s: s.update({"classifier.1.bias": torch.zeros(4)}), "found shape [4] float32"),
        (lambda s: s.update({"classifier.1.bias": torch.zeros(3).double()}), "found shape [3] float64"),
    ],
)
def test_a_private_state_that_does_not_fit_changes_nothing(spoil: Callable, message: str) -> None:
    model = patches.attach(small_backbone(), "scale_bias+last_layer", 3)
    state = {name: torch.full_like(tensor, 2) for name, tensor in model.private_state().items()}
    spoil(state)
    before = bits(model.private_state())
    with pytest.raises(PatchError) as error:
        model.load_private_state(state)
    assert message in str(error.value)
    assert bits(model.private_state()) == before


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.double(),
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("meta"),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.load_state_dict(m.state_dict(), assign=True),
    ],
)
def test_what_would_part_a_model_from_its_backbone_is_refused(convert: Callable[[PatchedModel], object]) -> None:
    model = patches.attach(small_backbone(), "scale_bias", 3)
    pointers = {name: tensor.data_ptr() for name, tensor in model.shared_state().items()}
    with pytest.raises(PatchError, match="attach"):
        convert(model)
    assert pointers == {name: tensor.data_ptr() for name, tensor in model.shared_state().items()}
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


def test_conversions_that_change_nothing_are_allowed() -> None:
    model = patches.attach(small_backbone(), "scale_bias", 3)
    assert model.float().to("cpu").to(torch.float32).cpu() is model
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_clone_is_independent_and_aliases_a_backbone_of_its_own(
    clone: Callable[[PatchedModel], PatchedModel],
) -> None:
    model, x = patches.attach(small_backbone(), "scale_bias", 3), images(2, 16)
    train(model)
    twin = clone(model)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(twin(x), expected)
        base = twin.backbone.network.state_dict()
        for name, tensor in twin.shared_state().items():
            assert tensor.data_ptr() == base[name].data_ptr() != model.shared_state()[name].data_ptr()
        for tensor in (*twin.private_state().values(), *twin.shared_state().values()):
            tensor.zero_()
        assert torch.equal(model(x), expected)
    assert twin.fixed_head == model.fixed_head
    assert twin.private_names == model.private_names


def test_running_part_of_a_model_uses_its_own_tensors() -> None:
    backbone = network("resnet18")
    model, x = patches.attach(backbone, "last_layer", 3), images(2, 32)
    train(model, size=32, count=4)
    with torch.no_grad():
        features: Tensor = backbone.run(x, 0, model.first_private_block)
        assert torch.equal(model.run(features, model.first_private_block), model(x))


@pytest.mark.parametrize("error", [patches.PatchError, patches.BackboneError, patches.BundleError, patches.ImageError])
def test_errors_cross_process_borders(error: type[Exception]) -> None:
    again = pickle.loads(pickle.dumps(error("what to do")))
    assert type(again) is error
    assert str(again) == "what to do"
