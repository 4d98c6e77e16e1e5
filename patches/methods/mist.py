"""Minimal interaction separated tuning: one sum of a frozen ViT's token maps, and a small network at the edge."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from patches.backbone import Backbone
from patches.errors import PatchError
from patches.layers import PatchConvolution, draw_linear, grid, recomputed
from patches.options import SWITCH, check_choice, check_whole, option_values
from patches.side import SIDE_SEEDS, SideMethod, SideNetwork
from patches.structure import seeded

BLOCKS = ("attention", "mlp", "depthwise")
READOUTS = ("class_token", "mean")
EPSILON = 1e-6  # ViT's


@dataclass
class Mist(SideMethod):
    """Read the sum of a ViT's token maps z₀ + ... + z_k through a few residual blocks.

    z₀ is the embedding, zᵢ the output of block i. Every block is x + f(LN(x)), f = 0 at the start: "attention" with one
    head of `rank` dimensions, "mlp" with 2 · rank hidden units and GELU, or "depthwise", a 3 x 3 convolution of the
    patch grid that leaves the class token alone; none has a bias. A LayerNorm without parameters follows, then the
    class token or the mean of the patch tokens (`readout`; by default the class token, and the mean for "depthwise").

    `k` is the last map summed, by default N; choose it on validation data (`candidates`). `gather` False reads z_k
    alone, as the paper's ablation.

    Source: Tang, Fu and Wu, "Minimal Interaction Separated Tuning", CVPR 2025, arXiv:2406.17559. Rank 32 and no biases
        follow from its printed sizes; zeros at the start and the readout are ours, the paper states none.
    """

    k: int | None = None
    layers: int = 4
    rank: int = 32
    block: Literal["attention", "mlp", "depthwise"] = "attention"
    readout: Literal["class_token", "mean"] | None = None
    gather: bool = True

    identity_at_start: ClassVar[bool] = True

    def build(self, copy: Backbone) -> "MistNetwork":
        _check_backbone(copy.name)
        return self.build_network(copy.options)

    def build_network(self, backbone_options: Mapping[str, Any]) -> "MistNetwork":
        """Check and complete the options, and make the network from the CPU's generator.

        Args:
            backbone_options: of the ViT, which need not be there itself.
        """
        if self.k is None:
            self.k = backbone_options["num_layers"]
        check_whole("k", self.k, 0, backbone_options["num_layers"])
        check_whole("layers", self.layers, 1, None)
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
    """The blocks between a gathered map and the head."""

    def __init__(self, *, k: int, gather: bool, layers: int, rank: int, width: int, block: str, readout: str) -> None:
        super().__init__()
        self.reads = tuple(range(k + 1)) if gather else (k,)
        self.readout = readout
        self.blocks = nn.Sequential(*(Residual(width, rank, block) for _ in range(layers)))

    def condense(self, outputs: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The sum alone, under the number of its last map."""
        return {self.reads[-1]: reduce(torch.add, (outputs[step] for step in self.reads))}

    def forward(self, copy: Backbone, images: Tensor, outputs: Mapping[int, Tensor]) -> Tensor:  # noqa: ARG002
        return self.features(outputs[self.reads[-1]])

    def features(self, gathered: Tensor) -> Tensor:
        """Features (batch, d) of a gathered map (batch, 1 + patches, d)."""
        x = self.blocks(gathered)
        # A copy of the one token: the backward pass would keep the whole map of a view.
        x = x[:, 0].clone() if self.readout == "class_token" else x[:, 1:]
        x = functional.layer_norm(x, x.shape[-1:], eps=EPSILON)
        return x if self.readout == "class_token" else x.mean(1)


class Residual(nn.Module):
    """x + f(LN(x)) on tokens (batch, 1 + patches, d)."""

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
        # What LayerNorm gives is as large as the map, and cheap to make again from it.
        return x + self.function(recomputed(self._first, x, parameters=self.parameters()))

    def _first(self, x: Tensor) -> Tensor:
        return self.function.first(self.norm(x))


class LowRankAttention(nn.Module):
    """Softmax(q kᵀ / √r) v with one head of r dimensions, after `first`."""

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
    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = PatchConvolution(width, 3)
        nn.init.zeros_(self.convolution.weight)

    def first(self, x: Tensor) -> Tensor:
        return self.convolution(grid(x[:, 1:])).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x[:, :1]), x], dim=1)


# Server and edge apart


class Gather:
    """The server's side: sums of a frozen ViT's token maps. It holds nothing of any task."""

    def __init__(self, backbone: Backbone) -> None:
        """Raises:
        PatchError: a backbone that is no ViT.
        """
        _check_backbone(backbone.name)
        self._trunk = backbone.frozen()

    def __call__(self, images: Tensor, k: int | None = None) -> Tensor:
        """z₀ + ... + z_k, shape (batch, 1 + patches, d), of images (batch, 3, height, width); k is N by default."""
        k = self._trunk.num_blocks if k is None else k
        return self.candidates(images, [k])[k]

    @torch.no_grad()
    def candidates(self, images: Tensor, ks: Sequence[int]) -> dict[int, Tensor]:
        """k -> the sum up to z_k, for each of `ks`, from one pass that keeps one map beside them."""
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
    """The edge's side: from gathered maps to logits, without a backbone in the process.

    It has the tensors that `attach(backbone, "mist", num_classes, seed=seed, **options)` makes, under the same names,
    and `save_bundle` takes it: the bundle attaches to the full model with identical outputs.

    Attributes:
        backbone: `Backbone.identity()` of the backbone that the maps come from.
        method, options, num_classes, head: as PatchedModel has them.
    """

    method = "mist"
    head = "private"
    fixed_head = None

    def __init__(self, backbone: Mapping[str, Any], num_classes: int, *, seed: int = 0, **options: Any) -> None:
        """Args:
            backbone: what `Backbone.identity()` said where the maps were made.
            options: of `Mist`.
        Raises:
            PatchError: a backbone that is no ViT, or options that `attach` refuses.
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
        """Logits (batch, num_classes) of maps (batch, 1 + patches, d), of any float dtype."""
        return self.heads["head"](self.side.features(gathered.to(next(self.parameters()).dtype)))

    def private_state(self) -> dict[str, Tensor]:
        """The live tensors by name: what a bundle carries."""
        return self.state_dict(keep_vars=True)


def candidates(num_blocks: int) -> tuple[int, ...]:
    """The values of k to choose from on validation data: a third, two thirds and all of N blocks.

    Source: the paper tries three values, the largest N; which, its text does not say.
    """
    return tuple(sorted({max(1, round(num_blocks * part / 3)) for part in (1, 2, 3)}))


def _check_backbone(name: str) -> None:
    if name != "vit_b_16":
        raise PatchError(
            f"Patch method 'mist' is defined on vit_b_16, and this backbone is '{name}'. Use that, or 'parasite' "
            "beside a convolutional network, or 'dtl' on swin_b."
        )
