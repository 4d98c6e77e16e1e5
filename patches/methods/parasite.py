"""The method `parasite`: a narrow copy of a convolutional host that also reads the outputs of the host's stages."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

import torch
from torch import Tensor, nn

from patches.backbone import Backbone
from patches.errors import PatchError
from patches.options import SWITCH, check_choice, is_number
from patches.quoting import quoted
from patches.side import SideMethod, SideNetwork
from patches.structure import alias, copy_structure

HOSTS = ("resnet18", "resnet50", "mobilenet_v2")
"""The backbones that a parasite can read."""
RATIOS = tuple(Decimal(hundredths) / 100 for hundredths in range(1, 101))
"""The ratios that `target_percent` chooses from."""


@dataclass
class Parasite(SideMethod):
    """Run a narrow network of the backbone's kind on the same images, and join the backbone's activations to it.

    The backbone is called the host here, and the narrow network the parasite. If a convolution of the host has c output
    channels, the parasite's has floor(`ratio` · c). The input of the first block of each stage, and the input of the
    head, is the parasite's channels followed by all of the host's. The convolutions that read it are therefore wider by
    the host's channels, and so is the head. The host never reads the parasite.

    Without `num_classes` the head is the host's, with zero weights for the parasite's channels, so that the logits are
    the host's at the start. ResNet-18's first block has no convolution in its shortcut and gets one that starts as the
    identity.

    Source: Alini, Sturim, Brady and Khorrami, "Parasite Networks", MIT Lincoln Laboratory, 2024. The structure follows
        from its printed sizes. The details of slicing, and the channels that "add" adds, are ours.
    """

    ratio: float | None = None
    """Width of the parasite relative to the host, in (0, 1]. Give either this or `target_percent`."""
    target_percent: float | None = None
    """Size of the patch in percent of the whole host with a head for the task's classes. It selects the ratio, in
    hundredths, whose number of trained parameters, head included, comes nearest."""
    init: Literal["slice", "random"] = "slice"
    """The start values. "slice" copies them from the host: output channel i of the parasite starts as the host's output
    channel i, with the host's weights for the input channels that it reads. "random" draws the convolutions."""
    join: Literal["concatenate", "add"] = "concatenate"
    """How the host's activations are joined. "add", an ablation, adds the host's first channels to the parasite's. The
    convolutions and the head are then not wider."""
    zero_host: bool = False
    """Whether the host's activations are replaced by zeros, as in the paper's control experiment."""

    def build(self, copy: Backbone) -> SideNetwork:
        if copy.name not in HOSTS:
            raise PatchError(
                f"Patch method 'parasite' needs a convolutional host in stages ({', '.join(HOSTS)}), and this backbone "
                f"is '{copy.name}'. Use one of those, or patch method 'dtl' on vit_b_16 or swin_b."
            )
        if (self.ratio is None) == (self.target_percent is None):
            raise PatchError(
                f"Options ratio={quoted(self.ratio)} and target_percent={quoted(self.target_percent)} of patch method "
                "'parasite': "
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
        """Return the ratio as an exact decimal number."""
        if not (is_number(ratio) and 0 < ratio <= 1):
            raise PatchError(
                f"Option ratio={quoted(ratio)} of patch method 'parasite': use a number above 0 and up to 1."
            )
        # Decimal keeps the digits as they were written. With a binary float, floor(0.29 * 100) would be 28.
        return Decimal(str(ratio))

    def _nearest_ratio(self, copy: Backbone) -> float:
        """Return the ratio of `RATIOS` whose size comes nearest to `target_percent`."""
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
        if not (is_number(target) and low <= target <= high):
            raise PatchError(
                f"Option target_percent={quoted(target)} of patch method 'parasite': on '{copy.name}' with {classes} "
                f"classes use a number from {low:.2f} (ratio {possible[0]}) to {high:.1f} (ratio 1)."
            )
        first, last = 0, len(possible) - 1  # the percentages rise with the ratio
        while last - first > 1:
            middle = (first + last) // 2
            first, last = (middle, last) if percent(possible[middle]) <= target else (first, middle)
        return float(min(possible[first], possible[last], key=lambda ratio: abs(percent(ratio) - target)))


class ParasiteNetwork(SideNetwork):
    """The parasite: a narrow network that runs step by step like the host, and that the host's activations join."""

    reads_images = True

    def __init__(self, copy: Backbone, ratio: Decimal, init: str, join: str, zero_host: bool) -> None:
        """Build the parasite from the task's copy of the host.

        Raises:
            PatchError: the ratio leaves a convolution without channels.
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
                    # ResNet-18's first block has a shortcut without a convolution, which could not be narrowed.
                    module.downsample = _identity(width)
                narrowed, channels, width = narrow(module, channels, width)
                body.network.set_submodule(path, narrowed)
        self.body = body.network.requires_grad_(True)
        self.features = len(channels) + (width if join == "concatenate" else 0)
        """Number of inputs of the head: the parasite's channels and then the host's."""

    def forward(self, copy: Backbone, images: Tensor, outputs: Mapping[int, Tensor]) -> Tensor:
        body = Backbone(copy.name, copy.options, self.body)
        x = images
        for step in range(copy.num_blocks + 2):
            x = body.run(self._joined(x, outputs[step - 1]) if step in copy.stages else x, step, step + 1)
        return self._joined(x, outputs[copy.num_blocks + 1])

    def _joined(self, x: Tensor, host: Tensor) -> Tensor:
        """Join the host's activations to the parasite's activations `x`."""
        host = torch.zeros_like(host) if self.zero_host else host
        return torch.cat([x, host], dim=1) if self.join == "concatenate" else x + host[:, : x.shape[1]]


class _Narrow:
    """Makes the host's modules narrow. It names each channel of the parasite by the host's channel it stands for."""

    def __init__(self, ratio: Decimal, sliced: bool) -> None:
        self.ratio = ratio
        self.sliced = sliced

    def __call__(self, module: nn.Module, channels: Tensor, width: int) -> tuple[nn.Module, Tensor, int]:
        """Return a narrow version of a module.

        Args:
            module: a module of a copy of the host. Its children are replaced in place.
            channels: for each input channel of the narrow module, the index of the host's channel that it stands for.
            width: number of input channels of the host's module.
        Returns:
            The narrow module, and `channels` and `width` for its output.
        """
        if isinstance(module, nn.Conv2d):
            return self._convolution(module, channels)
        if isinstance(module, nn.BatchNorm2d):
            return self._norm(module, channels), channels, width
        entered = channels, width
        for name, child in list(module.named_children()):
            # A ResNet block's shortcut has the input of the block, not the output of the child before it.
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
    """Return a shortcut as a 1 x 1 convolution that computes the identity."""
    shortcut = nn.Conv2d(width, width, 1, bias=False)
    shortcut.weight = nn.Parameter(torch.eye(width)[:, :, None, None])
    return shortcut


def _replace_head(copy: Backbone, side: ParasiteNetwork) -> None:
    """Widen the head: the parasite's features come before the host's, with zero weights."""
    path, old = next(iter(copy.heads().items()))
    head = nn.Linear(side.features, old.out_features, device="meta")
    weight = old.weight.detach()
    if side.join == "concatenate":
        weight = torch.cat([weight.new_zeros(old.out_features, side.features - old.in_features), weight], dim=1)
    head.weight, head.bias = nn.Parameter(weight[:, : side.features]), nn.Parameter(old.bias.detach())
    copy.network.set_submodule(path, head)


def _narrowest(copy: Backbone) -> int:
    """Return the smallest number of output channels of the host's convolutions."""
    return min(layer.out_channels for layer in copy.network.modules() if isinstance(layer, nn.Conv2d))


def _in_head(copy: Backbone, name: str) -> bool:
    """Return whether the parameter `name` belongs to a head."""
    return name.rpartition(".")[0] in copy.heads()
