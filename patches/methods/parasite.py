"""Parasite networks: a narrow copy of a convolutional host that reads what the host's stages give."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

import torch
from torch import Tensor, nn

from patches.backbone import Backbone
from patches.errors import PatchError
from patches.options import SWITCH, check_choice
from patches.side import SideMethod, SideNetwork
from patches.structure import alias, copy_structure

HOSTS = ("resnet18", "resnet50", "mobilenet_v2")
RATIOS = tuple(Decimal(hundredths) / 100 for hundredths in range(1, 101))
"""What `target_percent` chooses from."""


@dataclass
class Parasite(SideMethod):
    """Run a narrow network of the host's kind on the same images and join the host's activations to it.

    Every convolution has floor(`ratio` · c) of the host's c output channels. At the first block of each stage, and at
    the pooled features, the parasite's channels are followed by the host's, all of them: the block's convolutions that
    read its input are as much wider, and so is the head. The host never reads the parasite.

    Give `ratio`, in (0, 1], or `target_percent`: the hundredth whose trained parameters, head included, come nearest to
    so many percent of the whole host's with the same head. `init` "slice" takes every tensor from the host's own:
    output channel i is the host's, and so are the weights from the parasite's channel j and from the host's channel j;
    "random" draws convolutions anew. `join` "add" adds the host's first channels instead, as an ablation; the widths
    then are those of the ratio alone. `zero_host` replaces the host's activations by zeros, the paper's control.

    Without num_classes the head is the host's with zeros for the parasite's channels, so that the logits are the host's
    at the start. ResNet-18's first block has no convolution in its shortcut and gets one that starts as the identity.

    Source: Alini, Sturim, Brady and Khorrami, "Parasite Networks", MIT Lincoln Laboratory, 2024. The structure follows
        from its printed sizes; slicing in detail, and what "add" adds, are ours.
    """

    ratio: float | None = None
    target_percent: float | None = None
    init: Literal["slice", "random"] = "slice"
    join: Literal["concatenate", "add"] = "concatenate"
    zero_host: bool = False

    def build(self, copy: Backbone) -> SideNetwork:
        if copy.name not in HOSTS:
            raise PatchError(
                f"Patch method 'parasite' needs a convolutional host in stages ({', '.join(HOSTS)}), and this backbone "
                f"is '{copy.name}'. Use one of those, or patch method 'dtl' on vit_b_16 or swin_b."
            )
        if (self.ratio is None) == (self.target_percent is None):
            raise PatchError(
                f"Options ratio={self.ratio} and target_percent={self.target_percent} of patch method 'parasite': "
                "give one of the two, for example ratio=0.09."
            )
        check_choice("init", self.init, ("slice", "random"))
        check_choice("join", self.join, ("concatenate", "add"))
        check_choice("zero_host", self.zero_host, SWITCH)
        if self.ratio is None:
            self.ratio, self.target_percent = self._nearest_ratio(copy), None
        side = ParasiteNetwork(copy, self._checked(self.ratio), self.init, self.join, self.zero_host)
        _replace_head(copy, side)
        return side

    def _checked(self, ratio: float) -> Decimal:
        if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise PatchError(f"Option ratio={ratio!r} of patch method 'parasite': use a number above 0 and up to 1.")
        # As it is written: floor(0.29 * 100) is 28 in binary.
        return Decimal(str(ratio))

    def _nearest_ratio(self, copy: Backbone) -> float:
        target, classes = self.target_percent, copy.options["num_classes"]
        host = sum(parameter.numel() for name, parameter in copy.network.named_parameters() if not _in_head(copy, name))
        head = next(iter(copy.heads().values()))
        whole = host + (head.in_features + 1) * classes

        def percent(ratio: Decimal) -> float:
            with torch.device("meta"):
                side = ParasiteNetwork(copy, ratio, "random", self.join, self.zero_host)
            body = sum(parameter.numel() for parameter in side.parameters())
            return 100 * (body + (side.features + 1) * classes) / whole

        possible = [ratio for ratio in RATIOS if int(ratio * _narrowest(copy)) > 0]
        low, high = percent(possible[0]), percent(possible[-1])
        if not isinstance(target, int | float) or not low <= target <= high:
            raise PatchError(
                f"Option target_percent={target!r} of patch method 'parasite': on '{copy.name}' with {classes} classes "
                f"use a number from {low:.2f} (ratio {possible[0]}) to {high:.1f} (ratio 1)."
            )
        first, last = 0, len(possible) - 1  # the percentages rise with the ratio
        while last - first > 1:
            middle = (first + last) // 2
            first, last = (middle, last) if percent(possible[middle]) <= target else (first, middle)
        return float(min(possible[first], possible[last], key=lambda ratio: abs(percent(ratio) - target)))


class ParasiteNetwork(SideNetwork):
    """The narrow network, read as the host's steps, and where the host's activations join it."""

    reads_images = True

    def __init__(self, copy: Backbone, ratio: Decimal, init: str, join: str, zero_host: bool) -> None:
        """Raises:
        PatchError: a ratio that leaves a convolution no channel.
        """
        super().__init__()
        if int(ratio * _narrowest(copy)) == 0:
            raise PatchError(
                f"Option ratio={ratio} of patch method 'parasite': a convolution of '{copy.name}' has "
                f"{_narrowest(copy)} channels, of which none would be left. Use {1 / _narrowest(copy):.3f} or more."
            )
        self.join = join
        self.zero_host = zero_host
        self.reads = (*(stage - 1 for stage in copy.stages), copy.num_blocks + 1)
        body = Backbone(copy.name, copy.options, copy_structure(copy.network, alias))
        for path in body.heads():
            body.network.set_submodule(path, nn.Identity())
        narrow = _Narrow(ratio, sliced=init == "slice")
        channels = torch.arange(3, device="cpu")
        width = 3
        for step in range(copy.num_blocks + 2):
            if step in copy.stages and join == "concatenate":
                channels = torch.cat([channels, torch.arange(width, device="cpu")])
            for path in body.paths(step, step + 1):
                module = body.network.get_submodule(path)
                if step in copy.stages and join == "concatenate" and getattr(module, "downsample", nn) is None:
                    module.downsample = _identity(width)  # ResNet-18's first block: its shortcut is to be narrowed too
                narrowed, channels, width = narrow(module, channels, width)
                body.network.set_submodule(path, narrowed)
        self.body = body.network.requires_grad_(True)
        self.features = len(channels) + (width if join == "concatenate" else 0)
        """Inputs of the head: the parasite's, then the host's."""

    def forward(self, copy: Backbone, images: Tensor, outputs: Mapping[int, Tensor]) -> Tensor:
        body = Backbone(copy.name, copy.options, self.body)
        x = images
        for step in range(copy.num_blocks + 2):
            x = body.run(self._joined(x, outputs[step - 1]) if step in copy.stages else x, step, step + 1)
        return self._joined(x, outputs[copy.num_blocks + 1])

    def _joined(self, x: Tensor, host: Tensor) -> Tensor:
        host = torch.zeros_like(host) if self.zero_host else host
        return torch.cat([x, host], dim=1) if self.join == "concatenate" else x + host[:, : x.shape[1]]


class _Narrow:
    """Makes a host's modules narrow; channels are told by the host's channel that each stands for."""

    def __init__(self, ratio: Decimal, sliced: bool) -> None:
        self.ratio = ratio
        self.sliced = sliced

    def __call__(self, module: nn.Module, channels: Tensor, width: int) -> tuple[nn.Module, Tensor, int]:
        """Args:
            module: of a copy of the host; its children are replaced in place.
            channels: for each channel that the narrow module reads, the index of the host's.
            width: channels that the host's module reads.
        Returns:
            The narrow module, and `channels` and `width` of what it gives.
        """
        if isinstance(module, nn.Conv2d):
            return self._convolution(module, channels)
        if isinstance(module, nn.BatchNorm2d):
            return self._norm(module, channels), channels, width
        entered = channels, width
        for name, child in list(module.named_children()):
            # A ResNet block's shortcut reads what the block reads, and gives what it gives.
            source = entered if name == "downsample" else (channels, width)
            narrowed, channels, width = self(child, *source)
            setattr(module, name, narrowed)
        return module, channels, width

    def _convolution(self, old: nn.Conv2d, channels: Tensor) -> tuple[nn.Module, Tensor, int]:
        depthwise = old.groups == old.in_channels > 1
        given = channels if depthwise else torch.arange(int(old.out_channels * self.ratio), device="cpu")
        new = nn.Conv2d(
            len(channels),
            len(given),
            old.kernel_size,  # type: ignore[arg-type]
            old.stride,  # type: ignore[arg-type]
            old.padding,  # type: ignore[arg-type]
            old.dilation,  # type: ignore[arg-type]
            groups=len(channels) if depthwise else 1,
            bias=old.bias is not None,
        )
        nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
        if self.sliced:
            rows = old.weight.detach()[given]
            new.weight = nn.Parameter(rows.clone() if depthwise else rows[:, channels])
        return new, given, old.out_channels

    def _norm(self, old: nn.BatchNorm2d, channels: Tensor) -> nn.BatchNorm2d:
        new = nn.BatchNorm2d(len(channels), old.eps, old.momentum)
        if self.sliced:
            for name, tensor in old.state_dict().items():
                values = tensor[channels] if tensor.dim() else tensor.clone()
                setattr(new, name, nn.Parameter(values) if name in new._parameters else values)
        return new


def _identity(width: int) -> nn.Conv2d:
    """A shortcut as a convolution."""
    shortcut = nn.Conv2d(width, width, 1, bias=False)
    shortcut.weight = nn.Parameter(torch.eye(width)[:, :, None, None])
    return shortcut


def _replace_head(copy: Backbone, side: ParasiteNetwork) -> None:
    """Give the head the parasite's features before the host's, with zeros as their weights."""
    path, old = next(iter(copy.heads().items()))
    head = nn.Linear(side.features, old.out_features, device="meta")
    weight = old.weight.detach()
    if side.join == "concatenate":
        weight = torch.cat([weight.new_zeros(old.out_features, side.features - old.in_features), weight], dim=1)
    head.weight, head.bias = nn.Parameter(weight[:, : side.features]), nn.Parameter(old.bias.detach())
    copy.network.set_submodule(path, head)


def _narrowest(copy: Backbone) -> int:
    return min(layer.out_channels for layer in copy.network.modules() if isinstance(layer, nn.Conv2d))


def _in_head(copy: Backbone, name: str) -> bool:
    return name.rpartition(".")[0] in copy.heads()
