"""How each torchvision network is built, and how it is read as a sequence of steps: stem, blocks, tail, head.

A step consists of module paths and of functions in this file. It holds no modules, so that the same steps can run every
structural copy of the network.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

MOST_BLOCKS = 256
"""Largest number of blocks and stages of a network together, so that no option asks for minutes of building. Swin-B has
24 blocks in 4 stages."""
NetworkFunction = Callable[[nn.Module, Tensor], Tensor]
"""A function of (network, x) that does what the network's forward does between two modules."""


@dataclass(frozen=True)
class Step:
    """One step of a network."""

    name: str
    """"stem", "block1" to "blockN", "tail" or "head"."""
    calls: tuple[str | NetworkFunction, ...]
    """The paths of the modules and the functions that the step calls, in order."""
    tensors: tuple[str, ...] = ()
    """Paths of the modules and tensors that the step uses and that are not among `calls`."""

    def owns(self, tensor_name: str) -> bool:
        """Return whether this step uses the state-dict tensor `tensor_name`."""
        prefixes = [call for call in self.calls if isinstance(call, str)]
        return any(
            tensor_name == prefix or tensor_name.startswith(f"{prefix}.") for prefix in (*prefixes, *self.tensors)
        )


def _one_stage(_network: nn.Module, _steps: list[Step]) -> tuple[int, ...]:
    return (1,)


@dataclass(frozen=True)
class Family:
    """Everything that the code must know about one torchvision architecture."""

    build: Callable[..., nn.Module]
    """Takes num_classes and every option, and returns a randomly initialised network."""
    steps: Callable[[nn.Module], list[Step]]
    """Takes a network and returns its steps in order."""
    heads: tuple[str, ...]
    """Paths of the Linear layers that give logits, the main one first. A network may have only some of them."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The default of every option."""
    pretrained_options: Mapping[str, Any] = field(default_factory=dict)
    """Defaults that replace those of `options` if torchvision's own weights are asked for by name."""
    auxiliary: str | None = None
    """Path of a branch that runs in training only, or None."""
    stages: Callable[[nn.Module, list[Step]], tuple[int, ...]] = _one_stage
    """Takes a network and its steps, and returns the number of the first block of each stage. A stage begins at a block
    that changes the width or the resolution, so that no residual connection crosses it."""


def _flatten(_network: nn.Module, x: Tensor) -> Tensor:
    return torch.flatten(x, 1)


def _sequence(stem: Step, blocks: list[tuple[str, ...]], tail: Step, head: Step) -> list[Step]:
    numbered = [Step(f"block{index}", calls) for index, calls in enumerate(blocks, start=1)]
    return [stem, *numbered, tail, head]


def _check_blocks(depths: Sequence[int]) -> None:
    """Check the numbers of blocks of all stages.

    Raises:
        ValueError: there are more than `MOST_BLOCKS` blocks or stages.
    """
    if sum(depths) + len(depths) > MOST_BLOCKS:
        raise ValueError(f"{sum(depths)} blocks in {len(depths)} stages, and {MOST_BLOCKS} together are possible")


# MobileNetV2


def _build_mobilenet_v2(num_classes: int, stem_stride: int, last_channel: int | None, **options: Any) -> nn.Module:
    from torchvision.models import MobileNetV2
    from torchvision.ops import Conv2dNormActivation

    _check_blocks([block[2] for block in options["inverted_residual_setting"] or ()])
    network = MobileNetV2(num_classes=num_classes, **options)
    if stem_stride not in (1, 2):
        raise ValueError(f"stem_stride={stem_stride}, and only 1 (small images) and 2 (the paper's) are possible")
    network.features[0][0].stride = (stem_stride, stem_stride)
    if last_channel is not None:
        # MobileNetV2 has no argument for the width before the head, so its last convolution and its head are replaced.
        tail = Conv2dNormActivation(
            network.features[-1][0].in_channels, last_channel, kernel_size=1, activation_layer=nn.ReLU6
        )
        nn.init.kaiming_normal_(tail[0].weight, mode="fan_out")
        head = nn.Linear(last_channel, num_classes)
        nn.init.normal_(head.weight, 0, 0.01)
        nn.init.zeros_(head.bias)
        network.features[-1], network.classifier[1], network.last_channel = tail, head, last_channel
    return network


def _pool_and_flatten(_network: nn.Module, x: Tensor) -> Tensor:
    return torch.flatten(nn.functional.adaptive_avg_pool2d(x, (1, 1)), 1)


def _mobilenet_v2_stages(network: nn.Module, steps: list[Step]) -> tuple[int, ...]:
    blocks = [network.get_submodule(f"features.{index}") for index in range(1, len(steps) - 2)]
    return tuple(number for number, block in enumerate(blocks, start=1) if not block.use_res_connect)


def _mobilenet_v2_steps(network: nn.Module) -> list[Step]:
    last = len(network.get_submodule("features")) - 1  # type: ignore[arg-type]
    return _sequence(
        Step("stem", ("features.0",)),
        [(f"features.{index}",) for index in range(1, last)],
        Step("tail", (f"features.{last}", _pool_and_flatten)),
        Step("head", ("classifier",)),
    )


# InceptionV3

_INCEPTION_STEM = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1"),
    *("Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"),
)
_INCEPTION_BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")


def _build_inception_v3(num_classes: int, **options: Any) -> nn.Module:
    from torchvision.models import Inception3

    return Inception3(num_classes=num_classes, init_weights=True, **options)


def _transform_input(network: nn.Module, x: Tensor) -> Tensor:
    return network._transform_input(x)  # type: ignore[operator]


def _inception_v3_steps(network: nn.Module) -> list[Step]:
    auxiliary = ("AuxLogits",) if network.AuxLogits is not None else ()
    return _sequence(
        Step("stem", (_transform_input, *_INCEPTION_STEM)),
        [(f"Mixed_{name}",) for name in _INCEPTION_BLOCKS],
        Step("tail", ("avgpool", _flatten)),
        # The auxiliary branch reads Mixed_6e's output, in training only. No other step depends on it, so it counts as
        # part of the head.
        Step("head", ("dropout", "fc"), tensors=auxiliary),
    )


# ResNet


def _build_resnet18(num_classes: int) -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=num_classes)


def _build_resnet50(num_classes: int) -> nn.Module:
    from torchvision.models import resnet50

    return resnet50(num_classes=num_classes)


def _resnet_steps(network: nn.Module) -> list[Step]:
    stages = [f"layer{index}" for index in range(1, 5)]
    return _sequence(
        Step("stem", ("conv1", "bn1", "relu", "maxpool")),
        [(f"{stage}.{index}",) for stage in stages for index, _ in enumerate(network.get_submodule(stage).children())],
        Step("tail", ("avgpool", _flatten)),
        Step("head", ("fc",)),
    )


def _resnet_stages(_network: nn.Module, steps: list[Step]) -> tuple[int, ...]:
    return tuple(number for number, step in enumerate(steps) if str(step.calls[0]).endswith(".0"))


# ViT


def _build_vit_b_16(num_classes: int, **options: Any) -> nn.Module:
    from torchvision.models import VisionTransformer

    _check_blocks([options["num_layers"]])
    return VisionTransformer(num_classes=num_classes, **options)


def _embed_patches(network: Any, x: Tensor) -> Tensor:
    tokens = network._process_input(x)
    tokens = torch.cat([network.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
    return network.encoder.dropout(tokens + network.encoder.pos_embedding)


def _class_token(_network: nn.Module, x: Tensor) -> Tensor:
    return x[:, 0]


def _vit_steps(network: nn.Module) -> list[Step]:
    layers = [name for name, _ in network.get_submodule("encoder.layers").named_children()]
    return _sequence(
        Step(
            "stem", (_embed_patches,), tensors=("conv_proj", "class_token", "encoder.pos_embedding", "encoder.dropout")
        ),
        [(f"encoder.layers.{name}",) for name in layers],
        Step("tail", ("encoder.ln", _class_token)),
        Step("head", ("heads",)),
    )


# Swin


def _build_swin_b(num_classes: int, **options: Any) -> nn.Module:
    from torchvision.models import SwinTransformer

    _check_blocks(options["depths"])
    # The function swin_b fixes the sizes and a stochastic depth of 0.5. The class takes them as arguments.
    return SwinTransformer(patch_size=[4, 4], num_classes=num_classes, **options)


def _swin_steps(network: nn.Module) -> list[Step]:
    blocks: list[tuple[str, ...]] = []
    entry: tuple[str, ...] = ()
    for index, part in enumerate(network.get_submodule("features")[1:], start=1):  # type: ignore[index]
        if not isinstance(part, nn.Sequential):
            # A merging counts as the beginning of the next stage's first block, not as the end of the block before it.
            entry = (f"features.{index}",)
            continue
        for position, _ in enumerate(part):
            blocks.append((*entry, f"features.{index}.{position}"))
            entry = ()
    return _sequence(
        Step("stem", ("features.0",)),
        blocks,
        Step("tail", ("norm", "permute", "avgpool", "flatten")),
        Step("head", ("head",)),
    )


def _swin_stages(_network: nn.Module, steps: list[Step]) -> tuple[int, ...]:
    # Every stage but the first begins with a block whose step calls a merging first.
    return (1, *(number for number in range(2, len(steps) - 2) if len(steps[number].calls) > 1))


FAMILIES: dict[str, Family] = {
    "mobilenet_v2": Family(
        _build_mobilenet_v2,
        _mobilenet_v2_steps,
        heads=("classifier.1",),
        options={
            "width_mult": 1.0,
            "inverted_residual_setting": None,
            "stem_stride": 2,
            "last_channel": None,
            "dropout": 0.2,
        },
        stages=_mobilenet_v2_stages,
    ),
    "inception_v3": Family(
        _build_inception_v3,
        _inception_v3_steps,
        heads=("fc", "AuxLogits.fc"),
        options={"aux_logits": True, "transform_input": False, "dropout": 0.5},
        pretrained_options={"transform_input": True},
        auxiliary="AuxLogits",
    ),
    "resnet18": Family(_build_resnet18, _resnet_steps, heads=("fc",), stages=_resnet_stages),
    "resnet50": Family(_build_resnet50, _resnet_steps, heads=("fc",), stages=_resnet_stages),
    "vit_b_16": Family(
        _build_vit_b_16,
        _vit_steps,
        heads=("heads.head",),
        options={
            "image_size": 224,
            "patch_size": 16,
            "num_layers": 12,
            "num_heads": 12,
            "hidden_dim": 768,
            "mlp_dim": 3072,
        },
    ),
    "swin_b": Family(
        _build_swin_b,
        _swin_steps,
        heads=("head",),
        options={
            "stochastic_depth_prob": 0.0,
            "embed_dim": 128,
            "depths": [2, 2, 18, 2],
            "num_heads": [4, 8, 16, 32],
            "window_size": [7, 7],
        },
        stages=_swin_stages,
    ),
}
