"""The model of one task: a network whose shared tensors alias a backbone and whose private tensors are a patch."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from patches.backbone import Backbone
from patches.errors import PatchError
from patches.layers import PatchedBatchNorm2d
from patches.quoting import quoted, shortened
from patches.structure import dtype_name, tensors_sha256

HeadOwner = Literal["shared", "private", "fixed"]


@dataclass(frozen=True)
class ParameterCounts:
    """The size of a patch. Both fields count numbers, not bytes."""

    trained: int
    """Number of values in the private parameters."""
    stored: int
    """Number of floating-point values that a bundle carries: the private parameters and BatchNorm's running mean and
    variance. BatchNorm's integer batch counters are also in the bundle, but are not counted."""


class PatchedModel(nn.Module):
    """A task's model: a network whose shared tensors alias the backbone's storage. `attach` makes it.

    A fresh model is in eval mode and frozen: its shared parameters take no gradient, and its shared BatchNorm layers
    stay in eval mode even after `train()`. `set_shared_trainable(True)` switches to joint training.

    This class is for the methods whose network runs by itself. `patches.side_model.SideModel` is the model of a task
    with a side network. `attach` chooses between the two.

    Attributes:
        network: the torchvision module with this task's tensors. InceptionV3 in train mode returns
            (logits, aux_logits).
        backbone: the Backbone that the model is attached to.
        method, options, num_classes: the arguments of `attach`; `options` also holds every default.
        head: who holds the head: "shared" (the backbone), "private" (the patch) or "fixed" (random values that are
            drawn from `seed` and never trained).
        seed: the seed of a fresh or fixed head.
        classes: name of each output, in order, or None if they are unknown. `load_bundle` sets it.
        preprocessing: how an image becomes the network's input, in the form in which a bundle holds it, or None if it
            is unknown. `load_bundle` sets it.
        private_names, shared_names: state-dict names in `network`. Every name is in exactly one of the two.
        reads: indices of the steps whose outputs `condense` needs. It is empty if the task needs the images only.
        first_private_block: index of the first step that differs from the backbone's: the first step that uses a
            private tensor, or the head if there is none. With a side network it is the step after the last one in
            `reads`. `backbone.run(x, 0, first_private_block)` gives the same values for every task on a frozen
            backbone in eval mode.
    """

    shared_in_eval: ClassVar[bool] = False
    """Whether the shared steps run in eval mode even after `train()`, as they do beside a side network."""

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
        self.classes: tuple[str, ...] | None = None
        self.preprocessing: Mapping[str, Any] | None = None
        names = list(network.state_dict())
        self.private_names = tuple(name for name in names if name in private_names)
        self.shared_names = tuple(name for name in names if name not in private_names)
        self.reads = self._steps_to_read()
        self.first_private_block = max(self.reads, default=-1) + 1
        self.set_shared_trainable(False)
        self.eval()

    def _steps_to_read(self) -> tuple[int, ...]:
        """Return the step before the first one that uses a private tensor, or nothing if that is the first step."""
        first = len(self.backbone.steps) - 1
        if self.private_names:
            first = self.backbone.first_step_of(self.private_names)
        return (first - 1,) if first else ()

    def forward(self, x: Tensor) -> Any:
        """Return the logits (batch, num_classes) of images (batch, 3, height, width)."""
        return self.network(x)

    @property
    def reads_images(self) -> bool:
        """Whether `own_part` reads the images."""
        return self.first_private_block == 0

    def shared_part(self, images: Tensor) -> dict[int, Tensor]:
        """Run the shared steps without autograd and return the outputs that `own_part` needs.

        The result depends on the images and the frozen backbone alone, unless there is a `random_shared_layer`.
        Therefore it can be stored.

        Args:
            images: shape (batch, 3, height, width).
        Returns:
            Step index -> tensor (batch, ...): the outputs of the steps in `reads`. MIST gives their sum instead.
        """
        with torch.no_grad():
            return dict(self.as_backbone().outputs(images, self.reads))

    def condense(self, outputs: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """Return what `own_part` needs of the step outputs. This is all of them, unless a side network needs less.

        Args:
            outputs: step index -> the backbone's output for the images. It holds at least the steps in `reads`.
        """
        return outputs

    @property
    def shared_key(self) -> Hashable:
        """A key that is equal for two tasks on one backbone if `condense` returns the same values for both."""
        return PatchedModel, self.reads

    @property
    def random_shared_layer(self) -> str | None:
        """Path of a dropout or stochastic-depth layer that makes the shared steps random in training, or None."""
        modules = dict(self.network.named_modules())
        for path in self.as_backbone().paths(0, self.first_private_block):
            for name, module in modules[path].named_modules(prefix=path) if path in modules else ():
                if getattr(module, "p", 0) > 0:
                    return name
        return None

    def shared_shapes(self, image_size: int) -> dict[int, tuple[int, ...]]:
        """Return the shapes of `shared_part` for one image, without the batch axis. No values are computed."""
        of_step = list(self.backbone.block_shapes(image_size).values())
        outputs = {step: torch.empty(1, *of_step[step], device="meta") for step in self.reads}
        return {step: tuple(kept.shape[1:]) for step, kept in self.condense(outputs).items()}

    def own_part(self, images: Tensor | None, shared: Mapping[int, Tensor]) -> Tensor:
        """Run the steps that differ from the backbone's and return the logits (batch, num_classes).

        Args:
            images: shape (batch, 3, height, width). None is allowed unless `reads_images`.
            shared: what `shared_part` or `condense` returned for the same images.
        """
        start = self.first_private_block
        x = shared[start - 1] if start else images
        assert x is not None
        return self.as_backbone().run(x, start)

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Run the steps[start:stop] with this task's tensors, as `Backbone.run` does.

        `run(images, 0, -1)` returns the features, which are the input of the head, and `run(features, -1)` the logits.
        """
        return self.as_backbone().run(x, start, stop)

    def as_backbone(self) -> Backbone:
        """Return the task's network as a Backbone: the same steps, with this task's tensors and head."""
        return Backbone(self.backbone.name, self.backbone.options, self.network)

    def private_state(self) -> dict[str, Tensor]:
        """Return the live private parameters and buffers by name. A bundle carries these."""
        return self._state(self.private_names)

    def shared_state(self) -> dict[str, Tensor]:
        """Return the live shared parameters and buffers by name. They alias the backbone's tensors of these names."""
        return self._state(self.shared_names)

    @property
    def fixed_head(self) -> dict[str, Any] | None:
        """The `seed` and the `sha256` of the tensors of a fixed random head, or None for another head."""
        if self.head != "fixed":
            return None
        tensors: dict[str, Tensor] = {}
        for path, layer in self.as_backbone().heads().items():
            tensors |= {f"{path}.weight": layer.weight, f"{path}.bias": layer.bias}
        return {"seed": self.seed, "sha256": tensors_sha256(tensors)}

    @property
    def shared_trainable(self) -> bool:
        """Whether the shared tensors are trained jointly. If False, they are frozen."""
        return self._shared_trainable

    def set_shared_trainable(self, on: bool) -> None:
        """Switch joint training on or off.

        If on, the shared parameters take gradients and the shared BatchNorm layers follow `train()`. If off, the shared
        tensors are frozen. A BatchNorm layer counts as shared if its running statistics are shared. So under
        `norm_statistics` every layer follows `train()`, and under `scale_bias` with source statistics none does.

        Raises:
            PatchError: joint training was asked for beside a side network.
        """
        self._shared_trainable = on
        for tensor in self.shared_state().values():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(on)
        private = set(self.private_names)
        for path, norm in self.as_backbone().batch_norms().items():
            if f"{path}.running_mean" not in private:
                assert isinstance(norm, PatchedBatchNorm2d)
                norm.frozen = not on
                norm.train(self.network.training)

    def parameter_counts(self, include_auxiliary: bool = True) -> ParameterCounts:
        """Count the private floating-point values.

        Args:
            include_auxiliary: whether the values of InceptionV3's auxiliary branch count too.
        """
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
        """Copy values into the private tensors, in place. Everything is checked before anything is written.

        Raises:
            PatchError: names, shapes or dtypes are not exactly this model's.
        """
        self.check_private_state(state)
        with torch.no_grad():
            for name, tensor in self.private_state().items():
                tensor.copy_(state[name])

    def check_private_state(self, state: Mapping[str, Tensor]) -> None:
        """Check that values fit the private tensors.

        Raises:
            PatchError: names, shapes or dtypes are not exactly this model's.
        """
        expected, found = _signatures(self.private_state()), _signatures(state)
        for name in [*expected, *found]:
            if expected.get(name) != found.get(name):
                raise PatchError(
                    f"Private tensor '{shortened(name)}': expected {expected.get(name, 'none')}, "
                    f"found {found.get(name, 'none')}. Load a state of method '{self.method}' with {self.num_classes} "
                    f"classes on backbone '{self.backbone.name}'; nothing was changed."
                )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load values in place, as `nn.Module.load_state_dict` does.

        Raises:
            PatchError: `assign` is True, which would separate the model from its backbone.
        """
        if assign:
            raise PatchError(
                "load_state_dict(assign=True) would replace the tensors that alias the backbone. "
                "Leave assign out, or load the backbone first and attach afterwards."
            )
        return super().load_state_dict(state_dict, strict)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Refuse a conversion that changes a tensor. torch calls this for `to`, `half`, `cuda` and the like."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if fn(tensor) is not tensor:
                raise PatchError(
                    f"Changing dtype, device or memory format would separate '{name}' from the backbone's storage. "
                    "Keep the order: load the backbone, change it with backbone.to(...), then attach."
                )
        return super()._apply(fn, recurse)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a deep copy or unpickled model. It has its own copy of the backbone and aliases that copy."""
        super().__setstate__(state)
        base = self.backbone.network.state_dict()
        for name, tensor in self.shared_state().items():
            tensor.data = base[name]

    def _state(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        state = self.network.state_dict(keep_vars=True)
        return {name: state[name] for name in names}


def _signatures(state: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"shape {quoted(list(tensor.shape))} {dtype_name(tensor)}" for name, tensor in state.items()}
