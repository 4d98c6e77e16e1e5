"""Backbones: how they run as sequences, their parts, and their hash."""

import copy
import json

import pytest
import torch
from torch import nn

import patches
from patches import BackboneError
from tests.patches.helpers import (
    NETWORKS,
    SMALL,
    SMALL_TRANSFORMERS,
    images,
    network,
    randomised,
    small_backbone,
    small_transformer,
)

NAMES = [*NETWORKS, *SMALL_TRANSFORMERS]
SIZES = {name: size for name, (_, size) in NETWORKS.items()} | dict.fromkeys(SMALL_TRANSFORMERS, 32)


@pytest.mark.parametrize("name", NAMES)
def test_the_sequence_is_the_network_bit_for_bit(name: str) -> None:
    backbone, x = network(name), images(2, SIZES[name])
    with torch.no_grad():
        expected = backbone.network(x)
        assert expected.std() > 1e-3
        assert torch.equal(backbone.run(x), expected)
        parts = x
        for index in range(len(backbone.steps)):
            parts = backbone.run(parts, index, index + 1)
        assert torch.equal(parts, expected)


@pytest.mark.parametrize(
    "options", [{"stem_stride": 2}, {"width_mult": 1.5}, {"last_channel": None, "width_mult": 0.25}, {"dropout": 0.5}]
)
def test_the_sequence_of_a_mobilenet_variant(options: dict) -> None:
    backbone, x = small_backbone(**options), images(2, 16)
    with torch.no_grad():
        assert torch.equal(backbone.run(x), backbone.network(x))


@pytest.mark.parametrize(
    ("name", "blocks", "block1", "last_block", "tail"),
    [
        ("mobilenet_v2", 17, (16, 112, 112), (320, 7, 7), (1280,)),
        ("inception_v3", 11, (256, 35, 35), (2048, 8, 8), (2048,)),
        ("resnet18", 8, (64, 56, 56), (512, 7, 7), (512,)),
        ("resnet50", 16, (256, 56, 56), (2048, 7, 7), (2048,)),
        ("swin_b", 24, (56, 56, 128), (7, 7, 1024), (1024,)),
    ],
)
def test_block_shapes(name: str, blocks: int, block1: tuple, last_block: tuple, tail: tuple) -> None:
    backbone = network(name)
    shapes = backbone.block_shapes(299 if name == "inception_v3" else 224)
    assert backbone.num_blocks == blocks
    assert backbone.steps[0] == "stem"
    assert backbone.steps[-2:] == ("tail", "head")
    assert (shapes["block1"], shapes[f"block{blocks}"], shapes["tail"]) == (block1, last_block, tail)
    assert shapes["head"] == (1000,)


@pytest.mark.parametrize("name", ["vit_b_16", "swin_b", "resnet18"])
def test_block_shapes_are_those_of_a_real_run(name: str) -> None:
    backbone, size = network(name), NETWORKS[name][1]
    x = images(1, size)
    with torch.no_grad():
        for index, shape in enumerate(backbone.block_shapes((size, size)).values()):
            x = backbone.run(x, index, index + 1)
            assert tuple(x.shape[1:]) == shape


def test_swin_blocks_give_their_own_output_and_merging_opens_the_next_stage() -> None:
    shapes = network("swin_b").block_shapes(224)
    assert [shapes[f"block{index}"] for index in (2, 3, 4, 5, 22, 23)] == [
        (56, 56, 128),
        (28, 28, 256),
        (28, 28, 256),
        (14, 14, 512),
        (14, 14, 512),
        (7, 7, 1024),
    ]


@pytest.mark.parametrize(
    ("name", "total", "head", "batch_norms", "channels"),
    [
        ("mobilenet_v2", 3_504_872, 1_281_000, 52, 17_056),
        ("inception_v3", 27_161_264, 2_049_000, 96, 18_112),
        ("resnet50", 25_557_032, 2_049_000, 53, 26_560),
        ("swin_b", 87_768_224, 1_025_000, 0, 0),
    ],
)
def test_sizes_of_the_networks(name: str, total: int, head: int, batch_norms: int, channels: int) -> None:
    backbone = network(name)
    assert sum(p.numel() for p in backbone.network.parameters()) == total
    main = next(iter(backbone.heads().values()))
    assert main.weight.numel() + main.bias.numel() == head
    layers = backbone.batch_norms().values()
    assert len(layers) == batch_norms
    assert sum(layer.num_features for layer in layers) == channels


def test_sizes_of_vit_and_of_inception_without_its_auxiliary_branch() -> None:
    hollow = {}
    for name, options in (("vit_b_16", {}), ("inception_v3", {"aux_logits": False})):
        with torch.device("meta"):
            hollow[name] = patches.load_backbone(name, **options)
    count = {name: sum(p.numel() for p in backbone.network.parameters()) for name, backbone in hollow.items()}
    assert count == {"vit_b_16": 86_567_656, "inception_v3": 23_834_568}
    assert hollow["vit_b_16"].block_shapes(224)["block12"] == (197, 768)
    inception = hollow["inception_v3"]
    assert (len(inception.batch_norms()), inception.auxiliary, list(inception.heads())) == (94, None, ["fc"])


def test_depthwise_layers_of_mobilenet() -> None:
    layers = network("mobilenet_v2").depthwise_layers()
    assert (len(layers), sum(layer.weight.numel() for layer in layers.values())) == (17, 64_224)
    assert network("resnet50").depthwise_layers() == {}


def test_inception_has_a_second_head_and_taps_mixed_6e() -> None:
    backbone, x = copy.deepcopy(network("inception_v3")), images(2, 299)
    assert list(backbone.heads()) == ["fc", "AuxLogits.fc"]
    for module in backbone.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    backbone.network.training = (
        True  # so that the branch runs. The layers stay in eval mode, so BatchNorm's statistics do not move.
    )
    after_6e = backbone.steps.index("block8") + 1
    with torch.no_grad():
        logits, aux_logits = backbone.network(x)
        assert torch.equal(backbone.run(x), logits)
        assert torch.equal(backbone.network.AuxLogits(backbone.run(x, 0, after_6e)), aux_logits)
    assert backbone.first_step_of(["AuxLogits.conv0.conv.weight"]) == backbone.steps.index("head")


def test_inception_keeps_its_input_transform() -> None:
    backbone, x = copy.deepcopy(network("inception_v3")), images(2, 75)
    with torch.no_grad():
        plain = backbone.run(x)
        backbone.network.transform_input = True
        assert not torch.equal(backbone.run(x), plain)
        assert torch.equal(backbone.run(x), backbone.network(x))
    built = patches.load_backbone("inception_v3", transform_input=True, aux_logits=False)
    assert built.network.transform_input is True


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_belongs_to_one_step(name: str) -> None:
    backbone = network(name)
    paths = {step: backbone.paths(number, number + 1) for number, step in enumerate(backbone.steps)}
    owners = {
        key: [step for step, of_step in paths.items() if any(f"{key}.".startswith(f"{path}.") for path in of_step)]
        for key in backbone.network.state_dict()
    }
    assert all(len(steps) == 1 for steps in owners.values()), owners


def test_a_deep_copy_runs_its_own_tensors() -> None:
    backbone, x = small_backbone(), images(2, 16)
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        before = backbone.run(x)
        for parameter in twin.network.parameters():
            parameter.mul_(1.5)
        assert torch.equal(backbone.run(x), before)
        assert not torch.equal(twin.run(x), before)


def test_options_rebuild_the_architecture() -> None:
    backbone = small_backbone(norm_momentum=0.25)
    architecture = json.loads(json.dumps(backbone.architecture()))
    again = patches.load_backbone(architecture["name"], **architecture["options"])
    assert again.architecture() == backbone.architecture()
    assert repr(again.network) == repr(backbone.network)
    assert {layer.momentum for layer in again.batch_norms().values()} == {0.25}
    assert {layer.momentum for layer in small_backbone().batch_norms().values()} == {0.1}


def test_last_channel_and_stem_stride_shape_the_small_net() -> None:
    shapes = small_backbone().block_shapes(16)
    assert (shapes["stem"], shapes["tail"], shapes["head"]) == ((32, 16, 16), (32,), (5,))
    assert small_backbone(stem_stride=2, last_channel=None).block_shapes(16)["tail"] == (1280,)


def test_random_weights_come_from_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    hashes = [patches.load_backbone("mobilenet_v2", seed=seed, **SMALL).content_hash() for seed in (3, 3, 4)]
    assert torch.equal(torch.rand(3), expected)
    assert hashes[0] == hashes[1] != hashes[2]


def test_content_hash_sees_every_tensor_and_no_layout() -> None:
    backbone = small_backbone()
    seen = {backbone.content_hash()}
    for tensor in backbone.network.state_dict().values():
        tensor.view(-1)[-1] += 1
        seen.add(backbone.content_hash())
    assert len(seen) == len(backbone.network.state_dict()) + 1
    before = backbone.content_hash()
    backbone.to(memory_format=torch.channels_last)
    assert not backbone.network.features[0][0].weight.is_contiguous()
    assert backbone.content_hash() == before
    assert backbone.to(torch.float64).content_hash() != before


def test_content_hash_sees_dtype_and_shape_beside_the_bytes() -> None:
    one, other = small_backbone(), small_backbone()
    counter = "features.0.1.num_batches_tracked"
    assert one.network.state_dict()[counter] == 0
    other.network.features[0][1].num_batches_tracked = torch.zeros((), dtype=torch.float64)  # the same eight bytes
    assert one.content_hash() != other.content_hash()
    other.network.features[0][1].num_batches_tracked = torch.zeros(1, dtype=torch.int64)
    assert one.content_hash() != other.content_hash()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mobilnet_v2", {}, "Unknown backbone 'mobilnet_v2'. Did you mean 'mobilenet_v2'?"),
        ("alexnet", {}, "Known: mobilenet_v2, inception_v3"),
        ("resnet18", {"width_mult": 1.0}, "Unknown option of backbone 'resnet18'"),
        ("resnet18", {"norm_momentum": "1e-1"}, "Option norm_momentum='1e-1' of backbone 'resnet18' is text"),
        ("mobilenet_v2", {"width_mul": 1.0}, "Did you mean 'width_mult'"),
        ("mobilenet_v2", {"stem_stride": 3}, "stem_stride=3"),
        ("mobilenet_v2", {"inverted_residual_setting": []}, "inverted_residual_setting"),
        ("mobilenet_v2", {"dropout": 7.0}, "dropout=7.0"),
        ("mobilenet_v2", {"width_mult": "wide"}, "width_mult='wide'"),
        ("mobilenet_v2", {"num_classes": -1}, "num_classes=-1"),
        ("vit_b_16", {"image_size": 33}, "image_size=33"),
    ],
)
def test_a_backbone_that_cannot_be_built(name: str, options: dict, message: str) -> None:
    with pytest.raises(BackboneError) as error:
        patches.load_backbone(name, **options)
    assert message in str(error.value)


def test_no_such_tensor() -> None:
    with pytest.raises(BackboneError, match=r"no tensor 'fc\.weight'"):
        randomised(small_backbone()).first_step_of(["fc.weight"])


def test_small_transformers_have_the_sizes_asked_for() -> None:
    vit, swin = small_transformer("small_vit"), small_transformer("small_swin")
    assert (vit.num_blocks, vit.block_shapes(32)["block4"]) == (4, (17, 16))
    assert vit.network.encoder.layers[0].mlp[0].out_features == 24
    assert (swin.num_blocks, swin.block_shapes(32)["block6"]) == (6, (1, 1, 64))


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet18", (1, 3, 5, 7)),
        ("resnet50", (1, 4, 8, 14)),
        ("mobilenet_v2", (1, 2, 4, 7, 11, 14, 17)),
        ("vit_b_16", (1,)),
        ("swin_b", (1, 3, 5, 23)),
        ("inception_v3", (1,)),
    ],
)
def test_stages_begin_where_width_or_resolution_change(name: str, stages: tuple) -> None:
    assert network(name).stages == stages


@pytest.mark.parametrize("name", ["small_vit", "small_swin", "resnet18"])
def test_outputs_are_those_of_the_run_cut_there(name: str) -> None:
    backbone, x = network(name), images(2, 32)
    wanted = (0, 2, backbone.num_blocks + 1)
    with torch.no_grad():
        outputs = dict(backbone.outputs(x, wanted))
        assert tuple(outputs) == wanted
        assert all(torch.equal(output, backbone.run(x, 0, step + 1)) for step, output in outputs.items())
        assert dict(backbone.outputs(x, ())) == {}
        for block in range(1, backbone.num_blocks + 1):
            before = backbone.run(x, 0, block)
            entered = backbone.enter(before, block)
            assert (entered is before) == (name != "small_swin" or block not in (2, 3, 6))
            assert torch.equal(backbone.run_entered(entered, block), backbone.run(before, block, block + 1))


def test_a_frozen_copy_stays_in_eval_mode_and_aliases() -> None:
    backbone = small_backbone()
    frozen = backbone.frozen()
    backbone.network.train()
    assert not any(module.training for module in frozen.network.modules())
    base = backbone.network.state_dict()
    assert all(tensor.data_ptr() == base[key].data_ptr() for key, tensor in frozen.network.state_dict().items())
    backbone.hold_in_eval(2)
    assert not any(
        module.training for path in ("0", "1") for module in backbone.network.features.get_submodule(path).modules()
    )
    assert backbone.network.features[2].training
