"""Attaching a patch: which tensors are a task's own, and the model they make with a backbone's shared ones."""

import dataclasses
import json
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from patches.backbone import Backbone
from patches.errors import PatchError
from patches.layers import FixedLinear, PatchedBatchNorm2d, draw_linear
from patches.method import MethodInfo, Patch
from patches.methods import METHODS
from patches.names import unknown_name_message
from patches.side import SIDE_SEEDS, side_of
from patches.structure import alias, copy_structure, dtype_name, seeded, tensors_sha256

HeadOwner = Literal["shared", "private", "fixed"]


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Sizes of a patch, in numbers (not bytes)."""

    trained: int
    """Private parameters."""
    stored: int
    """Private floats that a bundle carries: the parameters and BatchNorm's running mean and variance. The integer batch
    counters travel too and are not counted."""


def methods() -> dict[str, MethodInfo]:
    """Every patch method: what `attach` takes, alone or joined with "+"."""
    return {
        name: MethodInfo(kind=part.kind, foldable=part.foldable, identity_at_start=part.identity_at_start)
        for name, part in METHODS.items()
    }


class PatchedModel(nn.Module):
    """A task's model: a network whose shared tensors alias the backbone's storage. `attach` makes it.

    Fresh, it is in eval mode and frozen: shared parameters take no gradient and shared BatchNorm layers stay in eval
    mode, whatever `train()` is called on. `set_shared_trainable(True)` switches to joint training.

    Attributes:
        network: torchvision's module. `model(images)` is `network(images)`, but for a side method, whose network lies
            beside it in `network.side`; InceptionV3 in train mode returns (logits, aux_logits).
        backbone: the Backbone it is attached to.
        method, options, num_classes: as given to `attach`, the options complete.
        head: who holds the head: "shared" (the backbone), "private" (the patch), or "fixed" (random, from `seed`).
        seed: of a fresh or fixed head.
        private_names, shared_names: state-dict names in `network`, every one in exactly one of the two.
        first_private_block: index of the first step that uses a private tensor (the head's where there is none), or of
            the step after the last one that a side network reads; `backbone.run(x, 0, this)` is the same for every task
            on a frozen backbone in eval mode.
        reads: indices of the steps whose outputs `condense` needs; none where it starts from the images.
    """

    def __init__(
        self,
        backbone: Backbone,
        network: nn.Module,
        *,
        method: str,
        options: dict[str, Any],
        num_classes: int,
        head: HeadOwner,
        seed: int,
        private_names: frozenset[str],
    ) -> None:
        super().__init__()
        self.network = network
        self.backbone = backbone
        self.method = method
        self.options = options
        self.num_classes = num_classes
        self.head = head
        self.seed = seed
        names = list(network.state_dict())
        self.private_names = tuple(name for name in names if name in private_names)
        self.shared_names = tuple(name for name in names if name not in private_names)
        side = side_of(network)
        if side is not None:
            self.first_private_block = max(side.reads) + 1
        elif self.private_names:
            self.first_private_block = backbone.first_step_of(self.private_names)
        else:
            self.first_private_block = len(backbone.steps) - 1
        before = range(self.first_private_block)
        self.reads = tuple(before[-1:]) if side is None else side.reads
        self.set_shared_trainable(False)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        """Logits (batch, num_classes) of images (batch, 3, height, width).

        Beside a side network the shared steps run without autograd and in eval mode, whatever `train()` was called on.
        """
        if side_of(self.network) is None:
            return self.network(x)
        return self.own_part(x, self._shared_part(x))

    @property
    def reads_images(self) -> bool:
        """Whether `own_part` reads the images, not the shared part alone."""
        side = side_of(self.network)
        return self.first_private_block == 0 if side is None else side.reads_images

    def shared_part(self, images: Tensor) -> dict[int, Tensor]:
        """What the task needs of the shared steps, which run without autograd.

        It depends on the images and the frozen backbone alone, so that it can be stored, unless there is a
        `random_shared_layer`.

        Args:
            images: shape (batch, 3, height, width).
        Returns:
            Step index -> a tensor (batch, ...): the outputs of the steps `reads`, but for MIST their sum.
        """
        return dict(self._shared_part(images))

    def condense(self, outputs: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """What `own_part` needs of step outputs.

        Args:
            outputs: step index -> the backbone's output on the images, for at least `reads`.
        """
        side = side_of(self.network)
        return outputs if side is None else side.condense(outputs)

    @property
    def shared_key(self) -> Hashable:
        """Equal for the tasks on one backbone that condense the same outputs to the same."""
        return type(side_of(self.network)), self.reads

    @property
    def shared_in_eval(self) -> bool:
        """Whether the shared steps are in eval mode whatever `train()` was called on: beside a side network."""
        return side_of(self.network) is not None

    @property
    def random_shared_layer(self) -> str | None:
        """Path of a dropout or stochastic depth that makes the shared steps differ from one training pass to the next,
        or None."""
        if not self.shared_in_eval:
            modules = dict(self.network.named_modules())
            for path in self._copy().paths(0, self.first_private_block):
                for name, module in modules[path].named_modules(prefix=path) if path in modules else ():
                    if getattr(module, "p", 0) > 0:
                        return name
        return None

    def shared_shapes(self, image_size: int) -> dict[int, tuple[int, ...]]:
        """Shapes of `shared_part` for one image, without the batch axis; computes no values."""
        of_step = list(self.backbone.block_shapes(image_size).values())
        outputs = {step: torch.empty(1, *of_step[step], device="meta") for step in self.reads}
        return {step: tuple(kept.shape[1:]) for step, kept in self.condense(outputs).items()}

    def own_part(self, images: Tensor | None, shared: Mapping[int, Tensor]) -> Tensor:
        """The logits (batch, num_classes) from what `shared_part` gave, and from the images where `reads_images`."""
        copy = self._copy()
        side = side_of(self.network)
        if side is not None:
            return copy.run(side(copy, images, shared), len(copy.steps) - 1)
        start = self.first_private_block
        x = shared[start - 1] if start else images
        assert x is not None
        return copy.run(x, start)

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """As `Backbone.run`, with this task's tensors.

        Beside a side network the steps between the shared ones and the head read more than one output, so they run from
        the images only; what the head reads, the features, is `run(images, 0, -1)`, and `run(features, -1)` the logits.

        Raises:
            PatchError: a start or stop amid those steps.
        """
        copy, side = self._copy(), side_of(self.network)
        head = len(copy.steps) - 1
        first, end, _ = slice(start, stop).indices(head + 1)
        if side is None or (end < head and end <= self.first_private_block) or first == head:
            return copy.run(x, start, stop)
        if first != 0 or end < head:
            raise PatchError(
                f"Patch method '{self.method}' cannot run the steps {first} to {end - 1}: from step "
                f"{self.first_private_block} on its side network reads several outputs. Start at 0, and stop at "
                f"{self.first_private_block} or before, at -1 (features), or nowhere (logits)."
            )
        return self(x) if end > head else side(copy, x, self._shared_part(x))

    def private_state(self) -> dict[str, Tensor]:
        """The live private parameters and buffers by name: what a bundle carries."""
        return self._state(self.private_names)

    def shared_state(self) -> dict[str, Tensor]:
        """The live shared parameters and buffers by name: aliases of the backbone's, under the same names."""
        return self._state(self.shared_names)

    @property
    def fixed_head(self) -> dict[str, Any] | None:
        """For a fixed random head its seed and the SHA-256 of its tensors, else None."""
        if self.head != "fixed":
            return None
        tensors: dict[str, Tensor] = {}
        for path, layer in self._copy().heads().items():
            tensors |= {f"{path}.weight": layer.weight, f"{path}.bias": layer.bias}
        return {"seed": self.seed, "sha256": tensors_sha256(tensors)}

    @property
    def shared_trainable(self) -> bool:
        """Whether the shared tensors train jointly; False is frozen."""
        return self._shared_trainable

    def set_shared_trainable(self, on: bool) -> None:
        """Joint training (True): shared parameters take gradients and shared BatchNorm layers follow `train()`.

        Frozen (False): neither. A layer's running statistics decide who holds it, so under `norm_statistics` every
        layer follows `train()`; under `scale_bias` with source statistics none does.

        Raises:
            PatchError: joint training beside a side network.
        """
        if on and side_of(self.network) is not None:
            raise PatchError(
                f"Patch method '{self.method}' stands on a frozen backbone: no gradient reaches the steps that its "
                "side network reads. Train the shared tensors with another method (train_shared: true), export the "
                "backbone, and attach this method to it (train_shared: false)."
            )
        self._shared_trainable = on
        for tensor in self.shared_state().values():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(on)
        private = set(self.private_names)
        for path, norm in self._copy().batch_norms().items():
            if f"{path}.running_mean" not in private:
                assert isinstance(norm, PatchedBatchNorm2d)
                norm.frozen = not on
                norm.train(self.network.training)

    def parameter_counts(self, include_auxiliary: bool = True) -> ParameterCounts:
        """Count the private floats, with or without those of InceptionV3's auxiliary branch."""
        floats = [
            tensor
            for name, tensor in self.private_state().items()
            if tensor.is_floating_point() and (include_auxiliary or not name.startswith(f"{self.backbone.auxiliary}."))
        ]
        return ParameterCounts(
            trained=sum(tensor.numel() for tensor in floats if isinstance(tensor, nn.Parameter)),
            stored=sum(tensor.numel() for tensor in floats),
        )

    def load_private_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy values into the private tensors, in place. All is checked before anything is written.

        Raises:
            PatchError: names, shapes or dtypes are not exactly this model's.
        """
        own = self.private_state()
        expected, found = _signatures(own), _signatures(state)
        for name in [*expected, *found]:
            if expected.get(name) != found.get(name):
                raise PatchError(
                    f"Private tensor '{name}': expected {expected.get(name, 'none')}, found {found.get(name, 'none')}. "
                    f"Load a state of method '{self.method}' with {self.num_classes} classes on backbone "
                    f"'{self.backbone.name}'; nothing was changed."
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module.load_state_dict`, in place; `assign=True` would part the model from its backbone."""
        if assign:
            raise PatchError(
                "load_state_dict(assign=True) would replace the tensors that alias the backbone. "
                "Leave assign out, or load the backbone first and attach afterwards."
            )
        return super().load_state_dict(state_dict, strict)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Every conversion (`to`, `half`, `cuda`, ...) comes through here; one that changes a tensor is refused."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if fn(tensor) is not tensor:
                raise PatchError(
                    f"Changing dtype, device or memory format would part '{name}' from the backbone's storage. "
                    "Keep the order: load the backbone, change it with backbone.to(...), then attach."
                )
        return super()._apply(fn, recurse)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A deep copy or unpickled model has a backbone of its own, and aliases that."""
        super().__setstate__(state)
        base = self.backbone.network.state_dict()
        for name, tensor in self.shared_state().items():
            tensor.data = base[name]

    def _shared_part(self, images: Tensor) -> Mapping[int, Tensor]:
        """As `shared_part`, but each may be made when it is read: all at once may be larger than what a task keeps."""
        copy = self._copy()
        if self.shared_in_eval:
            copy.hold_in_eval(self.first_private_block)
        return self.condense(_Outputs(copy, images, self.reads))

    def _copy(self) -> Backbone:
        return Backbone(self.backbone.name, self.backbone.options, self.network)

    def _state(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        state = self.network.state_dict(keep_vars=True)
        return {name: state[name] for name in names}


class _Outputs(Mapping[int, Tensor]):
    """Outputs of a frozen network's steps, each made when it is read and held by its reader alone. To be read in order,
    each once."""

    def __init__(self, copy: Backbone, images: Tensor, reads: tuple[int, ...]) -> None:
        self._reads = reads
        self._made = copy.outputs(images, reads)

    def __getitem__(self, step: int) -> Tensor:
        with torch.no_grad():
            made, output = next(self._made)
        assert made == step, f"step {step} is read where {made} is next"
        return output

    def __iter__(self) -> Iterator[int]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)


def attach(
    backbone: Backbone, method: str, num_classes: int | None = None, *, seed: int = 0, **options: Any
) -> PatchedModel:
    """Make a task's model on a backbone, whose values it starts from and whose shared tensors it aliases.

    Args:
        backbone: with its weights, dtype and device final.
        method: names from `methods()`, joined with "+" ("scale_bias+last_layer").
        num_classes: None for the backbone's own head (shared, or copied where the method owns the head). A number
            makes a new head: random and private where the method owns the head; random, frozen and outside the state
            dict otherwise.
        seed: of the new head and of a side network, drawn on the CPU without touching the global random state.
        options: each goes to the one method that declares it.
    Raises:
        PatchError: unknown method or option, or a method that finds nothing to own in this backbone.
    """
    parts = _make_parts(method, options)
    if num_classes is not None and num_classes < 1:
        raise PatchError(f"num_classes={num_classes}, but a head needs 1 or more. Leave it out to use the backbone's.")
    classes = num_classes or backbone.options["num_classes"]
    options_of_task = {**backbone.options, "num_classes": classes}
    copy = Backbone(backbone.name, options_of_task, copy_structure(backbone.network, alias))
    for norm in copy.batch_norms().values():
        norm.__class__ = PatchedBatchNorm2d  # same data, and a train() that a frozen layer ignores
    with seeded(seed + SIDE_SEEDS):
        for part in parts:
            part.attach(copy)
    modules = dict(copy.network.named_modules())
    private = {
        key
        for key in copy.network.state_dict()
        if any(part.owns(key, modules[key.rpartition(".")[0]]) for part in parts)
    }
    head: HeadOwner = "private" if any(f"{path}.weight" in private for path in copy.heads()) else "shared"
    if num_classes is not None:
        head = "private" if head == "private" else "fixed"
        _replace_heads(copy, num_classes, seed, fixed=head == "fixed")
        modules = dict(copy.network.named_modules())
    for key in private:
        path, _, name = key.rpartition(".")
        module = modules[path]
        own = getattr(module, name).detach().clone()
        setattr(module, name, nn.Parameter(own) if name in module._parameters else own)
    return PatchedModel(
        backbone,
        copy.network,
        method=method,
        options=_complete_options(parts),
        num_classes=classes,
        head=head,
        seed=seed,
        private_names=frozenset(private),
    )


def _make_parts(method: str, options: dict[str, Any]) -> list[Patch]:
    """The methods of a combination, each with the options it declares."""
    names = method.split("+")
    for name in names:
        if name not in METHODS:
            raise PatchError(unknown_name_message("patch method", name, METHODS))
        if names.count(name) > 1:
            raise PatchError(f"Patch method '{method}' names '{name}' twice. Name each method once.")
    declared = {name: _declared_options(METHODS[name]) for name in names}
    for option in options:
        claimants = [name for name in names if option in declared[name]]
        if not claimants:
            allowed = [known for known_options in declared.values() for known in known_options]
            raise PatchError(unknown_name_message(f"option of patch method '{method}'", option, allowed))
        if len(claimants) > 1:
            raise PatchError(
                f"Option '{option}' of patch method '{method}' is declared by {' and '.join(claimants)}. "
                "Attach methods that share no option name."
            )
    for name in names:
        if METHODS[name].kind == "side" and len(names) > 1:
            raise PatchError(
                f"Patch method '{method}' joins '{name}' with others, but a side network stands on a frozen backbone "
                f"and owns its head already. Attach '{name}' alone."
            )
    parts: dict[str, Any] = {name: METHODS[name] for name in names}
    return [part(**{key: options[key] for key in declared[name] if key in options}) for name, part in parts.items()]


def _declared_options(part: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(part) if field.init]


def _complete_options(parts: list[Patch]) -> dict[str, Any]:
    """Every option with its value, the defaults too, as JSON would give it back."""
    return json.loads(json.dumps({name: getattr(part, name) for part in parts for name in _declared_options(part)}))


def _replace_heads(copy: Backbone, num_classes: int, seed: int, fixed: bool) -> None:
    """Put fresh heads of `num_classes` outputs in place, all drawn in order from one seed."""
    generator = torch.Generator().manual_seed(seed)
    side = side_of(copy.network)
    draw = draw_linear if side is None else side.draw_head
    for path, old in copy.heads().items():
        weight, bias = (tensor.to(old.weight) for tensor in draw(old.in_features, num_classes, generator))
        layer = FixedLinear(weight, bias) if fixed else nn.Linear(old.in_features, num_classes, device="meta")
        if not fixed:
            layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        copy.network.set_submodule(path, layer)
    if hasattr(copy.network, "num_classes"):
        copy.network.num_classes = num_classes  # type: ignore[assignment]


def _signatures(state: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"shape {list(tensor.shape)} {dtype_name(tensor)}" for name, tensor in state.items()}
