"""The model of a task with a side network, which reads step outputs of the frozen backbone."""

from collections.abc import Hashable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from patches.backbone import Backbone
from patches.errors import PatchError
from patches.model import PatchedModel
from patches.side import SideNetwork, side_of


class SideModel(PatchedModel):
    """A patched model whose side network computes the features for the head from outputs of the shared steps.

    The shared steps run without autograd and in eval mode, even after `train()`. `network.side` is the side network.
    """

    shared_in_eval: ClassVar[bool] = True

    @property
    def side(self) -> SideNetwork:
        """The side network, which the task owns."""
        return side_of(self.network)

    def _steps_to_read(self) -> tuple[int, ...]:
        return self.side.reads

    def forward(self, x: Tensor) -> Tensor:
        return self.own_part(x, self._shared_outputs(x))

    @property
    def reads_images(self) -> bool:
        return self.side.reads_images

    def shared_part(self, images: Tensor) -> dict[int, Tensor]:
        return dict(self._shared_outputs(images))

    def _shared_outputs(self, images: Tensor) -> Mapping[int, Tensor]:
        """Return what `shared_part` returns, but make each output when it is read.

        All outputs together can need more memory than everything else that a task keeps.
        """
        copy = self.as_backbone()
        copy.hold_in_eval(self.first_private_block)
        return self.condense(_Outputs(copy, images, self.reads))

    def condense(self, outputs: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        return self.side.condense(outputs)

    @property
    def shared_key(self) -> Hashable:
        return type(self.side), self.reads

    @property
    def random_shared_layer(self) -> str | None:
        return None

    def own_part(self, images: Tensor | None, shared: Mapping[int, Tensor]) -> Tensor:
        return super().run(self._features(images, shared), -1)

    def _features(self, images: Tensor | None, shared: Mapping[int, Tensor]) -> Tensor:
        return self.side(self.as_backbone(), images, shared)

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Run the steps[start:stop] with this task's tensors.

        The side network reads several step outputs at once. Therefore the steps between the shared ones and the head
        run only as a whole, from the images. `run(images, 0, -1)` returns the features, which are the input of the
        head, and `run(features, -1)` the logits.

        Raises:
            PatchError: `start` or `stop` lies between the shared steps and the head.
        """
        head = len(self.backbone.steps) - 1
        first, end, _ = slice(start, stop).indices(head + 1)
        if (end < head and end <= self.first_private_block) or first == head:
            return super().run(x, start, stop)
        if first != 0 or end < head:
            raise PatchError(
                f"Patch method '{self.method}' cannot run the steps {first} to {end - 1}: from step "
                f"{self.first_private_block} on its side network reads several outputs. Start at 0, and stop at "
                f"{self.first_private_block} or before, at -1 (features), or nowhere (logits)."
            )
        return self(x) if end > head else self._features(x, self._shared_outputs(x))

    def set_shared_trainable(self, on: bool) -> None:
        if on:
            raise PatchError(
                f"Patch method '{self.method}' stands on a frozen backbone: no gradient reaches the steps that its "
                "side network reads. Train the shared tensors with another method (train_shared: true), export the "
                "backbone, and attach this method to it (train_shared: false)."
            )
        super().set_shared_trainable(on)


class _Outputs(Mapping[int, Tensor]):
    """Step outputs of a frozen network. Each is computed, without autograd, when it is read, and is not kept here.

    The reader must take the outputs in ascending order, each exactly once.
    """

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
