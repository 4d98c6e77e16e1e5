"""A backbone: one torchvision network, read as a sequence of steps: stem, blocks 1 to N, tail, head."""

import json
import os
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor, nn

from patches.errors import BackboneError
from patches.families import FAMILIES, NetworkFunction
from patches.files import write_atomic
from patches.names import unknown_name_message
from patches.quoting import quoted, shortened
from patches.structure import alias, copy_structure, meta, seeded, tensors_sha256
from patches.weights import build_from_file, is_weights_file, load_from_torchvision

NORM_LAYERS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
"""The types of normalisation layers that patch methods know."""


class Backbone:
    """A network that can be run step by step, and the names of its parts.

    Attributes:
        name: the architecture's name in torchvision, for example "mobilenet_v2".
        options: all options that the architecture was built with, including `num_classes`. JSON can hold them.
        network: the torchvision module. Change its dtype, device or memory format with `to` before the first `attach`,
            because the patched models alias its storage.
        steps: names of the steps in order: "stem", "block1" to "blockN", "tail", "head". The tail returns the pooled
            features (batch, width), the head the logits.
        stages: number of the first block of each stage, in order. It is (1,) if all blocks have the same width and
            resolution.
    """

    def __init__(self, name: str, options: dict[str, Any], network: nn.Module) -> None:
        self.name = name
        self.options = options
        self.network = network
        self._family = FAMILIES[name]
        self._steps = self._family.steps(network)
        self.steps = tuple(step.name for step in self._steps)
        self.stages = self._family.stages(network, self._steps)

    @property
    def num_blocks(self) -> int:
        """Number N of blocks. The stem is step 0, block i is step i, the tail step N + 1 and the head step N + 2."""
        return len(self.steps) - 3

    @property
    def auxiliary(self) -> str | None:
        """Path of InceptionV3's auxiliary branch, which runs in training only, or None if there is none."""
        path = self._family.auxiliary
        return path if path is not None and getattr(self.network, path) is not None else None

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Run the steps[start:stop].

        Args:
            x: the input of step `start`: images (batch, 3, height, width) for step 0, else the output of the step
                before.
        Returns:
            The output of the last step. In eval mode `run(images)` equals `network(images)` bit for bit. In train mode
            InceptionV3's network also returns auxiliary logits, and `run` returns the main logits alone.
        """
        for step in self._steps[start:stop]:
            x = self._call(step.calls, x)
        return x

    def outputs(self, images: Tensor, wanted: Collection[int]) -> Iterator[tuple[int, Tensor]]:
        """Run the steps once, up to the last wanted one, and yield the wanted outputs on the way.

        Args:
            images: shape (batch, 3, height, width).
            wanted: indices of steps.
        Yields:
            Each wanted index in ascending order with that step's output, which has the same bits as
            `run(images, 0, index + 1)`.
        """
        x = images
        for index in range(max(wanted, default=-1) + 1):
            x = self.run(x, index, index + 1)
            if index in wanted:
                yield index, x

    def enter(self, x: Tensor, block: int) -> Tensor:
        """Return the input of block number `block`, given the output `x` of the step before.

        The two differ at the first block of a Swin stage, where a merging comes first.
        """
        return self._call(self._steps[block].calls[:-1], x)

    def run_entered(self, x: Tensor, block: int) -> Tensor:
        """Run the rest of a block's step: `run_entered(enter(x, block), block)` equals `run(x, block, block + 1)`."""
        return self._call(self._steps[block].calls[-1:], x)

    def paths(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Return the paths of the modules and tensors that the steps[start:stop] use."""
        steps = self._steps[start:stop]
        return [path for step in steps for path in (*step.calls, *step.tensors) if isinstance(path, str)]

    def hold_in_eval(self, stop: int) -> None:
        """Put every module of the steps[:stop] into eval mode.

        Dropout and stochastic depth are then off, and BatchNorm uses its running statistics and does not change them.
        """
        for path in self.paths(0, stop):
            parent, _, name = path.rpartition(".")
            found = getattr(self.network.get_submodule(parent), name)
            for module in found.modules() if isinstance(found, nn.Module) else ():
                module.training = False

    def frozen(self) -> Self:
        """Return a copy of the structure over the same storage, in eval mode.

        The copy stays in eval mode when this backbone's network is put into train mode.
        """
        return type(self)(self.name, self.options, copy_structure(self.network, alias).eval())

    def block_shapes(self, image_size: int | tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Return the output shape of every step for one image, without the batch axis. No values are computed.

        Args:
            image_size: side in pixels, or (height, width).
        Returns:
            Name of the step -> shape, in the order of the steps.
        """
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        hollow = Backbone(self.name, self.options, copy_structure(self.network, meta).eval())
        x = torch.empty(1, 3, height, width, device="meta", dtype=next(self.network.parameters()).dtype)
        shapes = {}
        with torch.no_grad():
            for index, name in enumerate(self.steps):
                x = hollow.run(x, index, index + 1)
                shapes[name] = tuple(x.shape[1:])
        return shapes

    def first_step_of(self, tensor_names: Collection[str]) -> int:
        """Return the index of the first step that uses one of the state-dict tensors.

        InceptionV3's auxiliary branch counts as part of the head.

        Raises:
            BackboneError: no step uses any of them.
        """
        for index, step in enumerate(self._steps):
            if any(step.owns(name) for name in tensor_names):
                return index
        missing = ", ".join(f"'{name}'" for name in tensor_names)
        raise BackboneError(f"Backbone '{self.name}' has no tensor {missing}. See network.state_dict().")

    def norm_layers(self) -> dict[str, nn.Module]:
        """Return every BatchNorm2d, LayerNorm and GroupNorm: module path -> layer."""
        return dict(self._modules(NORM_LAYERS))

    def batch_norms(self) -> dict[str, nn.BatchNorm2d]:
        """Return every BatchNorm2d: module path -> layer."""
        return {path: layer for path, layer in self._modules(nn.BatchNorm2d) if isinstance(layer, nn.BatchNorm2d)}

    def depthwise_layers(self) -> dict[str, nn.Conv2d]:
        """Return every convolution with one group per input channel: module path -> layer."""
        convolutions = {path: layer for path, layer in self._modules(nn.Conv2d) if isinstance(layer, nn.Conv2d)}
        return {path: layer for path, layer in convolutions.items() if layer.groups == layer.in_channels > 1}

    def heads(self) -> dict[str, nn.Linear]:
        """Return the heads, the main one first: module path -> layer. InceptionV3's auxiliary branch has one too."""
        modules = dict(self.network.named_modules())
        found = {path: modules[path] for path in self._family.heads if path in modules}
        return {path: layer for path, layer in found.items() if isinstance(layer, nn.Linear)}

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Convert the network as `nn.Module.to` does, and return this backbone. Call it before anything is attached."""
        self.network.to(*args, **kwargs)
        return self

    def content_hash(self) -> str:
        """Return the SHA-256 (hex) over the state dict's sorted names, shapes, dtypes and contiguous bytes."""
        return tensors_sha256(self.network.state_dict())

    def architecture(self) -> dict[str, Any]:
        """Return `name` and `options`, which `load_backbone(name, weights=file, **options)` needs besides the file."""
        return {"name": self.name, "options": json.loads(json.dumps(self.options))}

    def identity(self) -> dict[str, Any]:
        """Return `name`, `options` and `content_hash`, by which a bundle names the one backbone that it fits."""
        return {**self.architecture(), "content_hash": self.content_hash()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state dict to a .safetensors file, atomically and with contiguous tensors.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        state = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.network.state_dict().items()
        }
        write_atomic(path, safetensors.torch.save(state))

    def _call(self, calls: tuple[str | NetworkFunction, ...], x: Tensor) -> Tensor:
        for call in calls:
            x = self.network.get_submodule(call)(x) if isinstance(call, str) else call(self.network, x)
        return x

    def _modules(self, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module]]:
        return ((path, module) for path, module in self.network.named_modules() if isinstance(module, kinds))


def is_identity(value: object) -> bool:
    """Return whether a value that was read from a file has the form of `Backbone.identity`."""
    match value:
        case {"content_hash": str(), **architecture}:
            return is_architecture(architecture)
    return False


def is_architecture(value: object) -> bool:
    """Return whether a value that was read from a file has the form of `Backbone.architecture`.

    Its options can then be passed to `load_backbone`, as far as their names are concerned.
    """
    match value:
        case {"name": str(), "options": dict(options), **rest}:
            return not rest and not options.keys() & {"name", "weights", "seed"}
    return False


def load_backbone(
    name: str,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int = 1000,
    *,
    seed: int = 0,
    **options: Any,
) -> Backbone:
    """Build a torchvision network and load weights into it.

    Args:
        name: "mobilenet_v2", "inception_v3", "resnet18", "resnet50", "vit_b_16" or "swin_b".
        weights: None for random weights; or a torchvision name such as "IMAGENET1K_V2", whose head is left out if
            `num_classes` differs; or the path of a .safetensors, .pth or .pt state dict, which must fit exactly. The
            network takes the file's floating dtype.
        num_classes: number of outputs of the head.
        seed: seed of the random weights. The global random state stays as it was.
        options: options of the architecture (`patches.families.FAMILIES`), such as width_mult, stem_stride (1 for
            small images), last_channel (width before the head), image_size, or the depths and widths of a small ViT or
            Swin; and `norm_momentum`, the momentum of every BatchNorm layer (default: the network's own).
    Returns:
        The backbone, in eval mode and on the CPU.
    Raises:
        BackboneError: the name or an option is unknown, torchvision refuses a value, or the weights do not fit or hold
            NaN or infinity.
    """
    if name not in FAMILIES:
        raise BackboneError(unknown_name_message("backbone", name, FAMILIES))
    family = FAMILIES[name]
    defaults = {**family.options, "norm_momentum": None}
    for option in options:
        if option not in defaults:
            raise BackboneError(unknown_name_message(f"option of backbone '{name}'", option, defaults))
        if isinstance(options[option], str):
            raise BackboneError(
                f"Option {option}={quoted(options[option])} of backbone '{name}' is text, and no option of a backbone "
                "is. Give a number, a list, true or false, without quotes."
            )
    pretrained = weights is not None and not is_weights_file(weights)
    resolved = {
        "num_classes": num_classes,
        **defaults,
        **(family.pretrained_options if pretrained else {}),
        **options,
    }
    build = partial(_build, name, resolved, seed)
    network = build() if weights is None or pretrained else build_from_file(build, name, Path(weights))
    backbone = Backbone(name, resolved, network.eval())
    if pretrained:
        load_from_torchvision(network, name, str(weights), tuple(backbone.heads()), family.auxiliary)
    return backbone


def _build(name: str, options: dict[str, Any], seed: int) -> nn.Module:
    """Build the network with random weights. It draws from the CPU's generator, whose state is restored afterwards."""
    arguments = {key: value for key, value in options.items() if key != "norm_momentum"}
    try:
        json.dumps(options)
        with seeded(seed):
            network = FAMILIES[name].build(**arguments)
    except Exception as error:  # torchvision checks few of its arguments: a wrong one raises whatever comes of it
        given = ", ".join(f"{key}={quoted(value)}" for key, value in options.items())
        raise BackboneError(
            f"Backbone '{name}' cannot be built from {shortened(given)}: {shortened(error)}. Change that option."
        ) from error
    if options["norm_momentum"] is not None:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = options["norm_momentum"]
    return network
