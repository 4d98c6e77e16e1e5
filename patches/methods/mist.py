"""The method `mist`: minimal interaction separated tuning.

A small network reads one sum of a frozen ViT's token maps. It can run at the edge, on a device without the backbone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from patches.backbone import Backbone
from patches.errors import PatchError
from patches.families import MOST_BLOCKS
from patches.layers import PatchConvolution, draw_linear, grid, recomputed
from patches.options import SWITCH, check_choice, check_whole, option_values
from patches.side import SIDE_SEEDS, SideMethod, SideNetwork
from patches.structure import seeded

BLOCKS = ("attention", "mlp", "depthwise")
READOUTS = ("class_token", "mean")
EPSILON = 1e-6
"""The ε of LayerNorm, as in ViT."""


@dataclass
class Mist(SideMethod):
    """Run a few residual blocks on z₀ + ... + z_k, the sum of a ViT's token maps.

    z₀ is the embedding, and zᵢ the output of the backbone's block i. Each residual block computes x + f(LN(x)), with
    f = 0 at the start and without biases. A LayerNorm without parameters and the readout follow.

    Source: Tang, Fu and Wu, "Minimal Interaction Separated Tuning", CVPR 2025, arXiv:2406.17559. Rank 32 and the
        missing biases follow from its printed sizes. The paper states neither the values at the start nor the readout.
        The zeros at the start and the readout are ours.
    """

    k: int | None = None
    """Index of the last map in the sum. The default is the number of blocks. Choose it on validation data, for example
    among `candidates`."""
    layers: int = 4
    """Number of residual blocks."""
    rank: int = 32
    """Width inside the residual blocks. See `block`."""
    block: Literal["attention", "mlp", "depthwise"] = "attention"
    """The function f: "attention" with one head of `rank` dimensions; "mlp" with 2 · rank hidden units and GELU; or
    "depthwise", a 3 x 3 convolution of the patch grid that does not change the class token."""
    readout: Literal["class_token", "mean"] | None = None
    """The features: the class token, or the mean of the patch tokens. The default is the class token, and the mean if
    `block` is "depthwise"."""
    gather: bool = True
    """Whether the maps are summed. False reads z_k alone, as an ablation in the paper does."""

    identity_at_start: ClassVar[bool] = True

    def build(self, copy: Backbone) -> "MistNetwork":
        _check_backbone(copy.name)
        return self.build_network(copy.options)

    def build_network(self, backbone_options: Mapping[str, Any]) -> "MistNetwork":
        """Check and complete the options, and make the side network. Only the ViT's options are needed, not the ViT.

        Args:
            backbone_options: the options that the ViT was built with.
        Raises:
            PatchError: an option does not fit.
        """
        if self.k is None:
            self.k = backbone_options["num_layers"]
        check_whole("k", self.k, 0, backbone_options["num_layers"])
        check_whole("layers", self.layers, 1, MOST_BLOCKS)
        check_whole("rank", self.rank, 1, None)
        check_choice("block", self.block, BLOCKS)
        check_choice("gather", self.gather, SWITCH)
        if self.readout is None:
            self.readout = "mean" if self.block == "depthwise" else "class_token"
        check_choice("readout", self.readout, READOUTS)
        if (self.block, self.readout) == ("depthwise", "class_token"):
            raise PatchError(
                "Options block='depthwise' and readout='class_token': the convolution mixes patch tokens only, so that "
                "the class token would never learn of them. Use readout='mean'."
            )
        return MistNetwork(
            k=self.k,
            gather=self.gather,
            layers=self.layers,
            rank=self.rank,
            width=backbone_options["hidden_dim"],
            block=self.block,
            readout=self.readout,
        )


class MistNetwork(SideNetwork):
    """The side network of MIST: the residual blocks between a gathered map and the head."""

    def __init__(self, *, k: int, gather: bool, layers: int, rank: int, width: int, block: str, readout: str) -> None:
        super().__init__()
        self.reads = tuple(range(k + 1)) if gather else (k,)
        self.readout = readout
        self.blocks = nn.Sequential(*(Residual(width, rank, block) for _ in range(layers)))

    def condense(self, outputs: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return the sum of the maps alone, with the index of the last map as its key."""
        return {self.reads[-1]: reduce(torch.add, (outputs[step] for step in self.reads))}

    def forward(self, copy: Backbone, images: Tensor, outputs: Mapping[int, Tensor]) -> Tensor:  # noqa: ARG002
        return self.features(outputs[self.reads[-1]])

    def features(self, gathered: Tensor) -> Tensor:
        """Return the features (batch, d) of a gathered map (batch, 1 + patches, d)."""
        x = self.blocks(gathered)
        # The clone lets go of the map. A view of one token would keep the whole map for the backward pass.
        x = x[:, 0].clone() if self.readout == "class_token" else x[:, 1:]
        x = functional.layer_norm(x, x.shape[-1:], eps=EPSILON)
        return x if self.readout == "class_token" else x.mean(1)


class Residual(nn.Module):
    """A residual block x + f(LN(x)) on tokens (batch, 1 + patches, d).

    Each f is split into a part `first`, which the backward pass computes again together with LayerNorm, and `forward`.
    """

    def __init__(self, width: int, rank: int, block: str) -> None:
        super().__init__()
        functions: dict[str, Callable[[], LowRankAttention | LowRankMLP | Depthwise]] = {
            "attention": lambda: LowRankAttention(width, rank),
            "mlp": lambda: LowRankMLP(width, 2 * rank),
            "depthwise": lambda: Depthwise(width),
        }
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.function = functions[block]()

    def forward(self, x: Tensor) -> Tensor:
        # LayerNorm's output is as large as the map and cheap to compute again, so it is not kept.
        return x + self.function(recomputed(self._first, x, parameters=self.parameters()))

    def _first(self, x: Tensor) -> Tensor:
        return self.function.first(self.norm(x))


class LowRankAttention(nn.Module):
    """Attention with one head of r dimensions: softmax(q kᵀ / √r) v. `first` computes q, k and v."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(width, 3 * rank, bias=False)
        self.out = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def first(self, x: Tensor) -> Tensor:
        return self.query_key_value(x)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = x.unsqueeze(1).chunk(3, dim=-1)
        return self.out(functional.scaled_dot_product_attention(query, key, value).squeeze(1))


class LowRankMLP(nn.Module):
    """A two-layer perceptron with GELU. `first` is its first layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def first(self, x: Tensor) -> Tensor:
        return self.down(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(functional.gelu(x))


class Depthwise(nn.Module):
    """A depthwise 3 x 3 convolution of the patch grid, in `first`. It adds zero to the class token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = PatchConvolution(width, 3)
        nn.init.zeros_(self.convolution.weight)

    def first(self, x: Tensor) -> Tensor:
        return self.convolution(grid(x[:, 1:])).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x[:, :1]), x], dim=1)


# Training in two places: a server runs the backbone, and an edge device trains the side network and the head


class Gather:
    """The server's part: it computes sums of a frozen ViT's token maps. It holds no tensors of a task."""

    def __init__(self, backbone: Backbone) -> None:
        """Raises:
        PatchError: the backbone is not a ViT.
        """
        _check_backbone(backbone.name)
        self._trunk = backbone.frozen()

    def __call__(self, images: Tensor, k: int | None = None) -> Tensor:
        """Return the sum z₀ + ... + z_k for a batch of images.

        Args:
            images: shape (batch, 3, height, width).
            k: index of the last map, by default the number of blocks.
        Returns:
            Shape (batch, 1 + patches, d).
        """
        k = self._trunk.num_blocks if k is None else k
        return self.candidates(images, [k])[k]

    @torch.no_grad()
    def candidates(self, images: Tensor, ks: Sequence[int]) -> dict[int, Tensor]:
        """Return the sums for several k from one pass: k -> z₀ + ... + z_k. See `__call__` for the shapes."""
        for k in ks:
            check_whole("k", k, 0, self._trunk.num_blocks)
        sums: dict[int, Tensor] = {}
        gathered: Tensor | None = None
        for step, output in self._trunk.outputs(images, range(max(ks) + 1)):
            gathered = output if gathered is None else gathered + output
            if step in ks:
                sums[step] = gathered
        return sums


class Edge(nn.Module):
    """The edge's part: it computes logits from gathered maps. The process needs no backbone.

    It has the tensors that `attach(backbone, "mist", num_classes, seed=seed, **options)` makes, with the same names and
    values. `save_bundle` takes it, and the model that `load_bundle` makes of the bundle gives identical outputs.

    Attributes:
        backbone: the `Backbone.identity()` of the backbone that computed the maps.
        method, options, num_classes, head, fixed_head: as in PatchedModel.
    """

    method = "mist"
    head = "private"
    fixed_head = None

    def __init__(self, backbone: Mapping[str, Any], num_classes: int, *, seed: int = 0, **options: Any) -> None:
        """Args:
            backbone: the `Backbone.identity()` of the backbone that computed the maps.
            num_classes: number of outputs of the head.
            seed: seed of the side network and the head.
            options: options of `Mist`.
        Raises:
            PatchError: the backbone is not a ViT, or `attach` would refuse an option.
        """
        super().__init__()
        _check_backbone(backbone["name"])
        method = Mist(**options)
        with seeded(seed + SIDE_SEEDS):
            self.side = method.build_network(backbone["options"])
        self.backbone = dict(backbone)
        self.options = option_values(method)
        self.num_classes = num_classes
        layer = nn.Linear(backbone["options"]["hidden_dim"], num_classes, device="meta")
        weight, bias = draw_linear(layer.in_features, num_classes, torch.Generator().manual_seed(seed))
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.heads = nn.ModuleDict({"head": layer})

    def forward(self, gathered: Tensor) -> Tensor:
        """Return the logits (batch, num_classes) of maps (batch, 1 + patches, d), which may have any float dtype."""
        return self.heads["head"](self.side.features(gathered.to(next(self.parameters()).dtype)))

    def private_state(self) -> dict[str, Tensor]:
        """Return the live tensors by name. A bundle carries these."""
        return self.state_dict(keep_vars=True)


def candidates(num_blocks: int) -> tuple[int, ...]:
    """Return values of k to choose from on validation data: a third, two thirds and all of the blocks.

    Source: the paper tries three values of k, and the largest is the number of blocks. It does not state the other two.
    """
    return tuple(sorted({max(1, round(num_blocks * part / 3)) for part in (1, 2, 3)}))


def _check_backbone(name: str) -> None:
    if name != "vit_b_16":
        raise PatchError(
            f"Patch method 'mist' is defined on vit_b_16, and this backbone is '{name}'. Use that, or 'parasite' "
            "beside a convolutional network, or 'dtl' on swin_b."
        )
