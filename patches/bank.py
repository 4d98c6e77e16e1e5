"""Many tasks over one backbone in memory, the steps that they share computed once."""

import os
from collections.abc import Collection

import torch
from torch import Tensor

from patches.backbone import Backbone
from patches.bundle import load_bundle
from patches.errors import PatchError
from patches.model import PatchedModel
from patches.names import unknown_name_message


class PatchBank:
    """Tasks on one frozen backbone, answered together.

    Each task parts from the others at its `first_private_block`: a side network after the last step it reads, a last
    layer at the head, a patch of normalisation layers at the first of them.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._trunk = backbone.frozen()
        self._models: dict[str, PatchedModel | None] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names in the order in which they were added."""
        return tuple(self._models)

    def add(self, name: str, patch: PatchedModel | str | os.PathLike[str] | None = None) -> None:
        """Take up a task.

        Args:
            patch: a model attached to this backbone, which is put into eval mode; the path of a bundle; or None for
                the backbone's own head.
        Raises:
            PatchError: a name that is taken, or a model that does not alias this backbone's tensors.
            BundleError: as `load_bundle`.
        """
        if name in self._models:
            raise PatchError(f"The bank has a task '{name}' already. Give this one another name.")
        if patch is not None and not isinstance(patch, PatchedModel):
            patch = load_bundle(patch, self.backbone)
        if patch is not None:
            base = self.backbone.network.state_dict()
            for key, tensor in patch.shared_state().items():
                if key not in base or tensor.data_ptr() != base[key].data_ptr():
                    raise PatchError(
                        f"Task '{name}' holds a shared tensor '{key}' that is not this bank's: it was attached to "
                        "another backbone. Attach it to the bank's, or save it as a bundle and add its path."
                    )
            patch.eval()
        self._models[name] = patch

    @torch.no_grad()
    def all_tasks(self, images: Tensor, tasks: Collection[str] | None = None) -> dict[str, Tensor]:
        """Every task on every image: the shared steps once, then each task's rest, without autograd.

        Args:
            images: shape (batch, 3, height, width).
            tasks: those to answer; all by default.
        Returns:
            Task -> logits (batch, its classes), the same bits as its model alone gives without autograd.
        Raises:
            PatchError: a task that was not added.
        """
        for name in tasks or ():
            if name not in self._models:
                raise PatchError(unknown_name_message("task of this bank", name, self._models))
        asked = {name: model for name, model in self._models.items() if tasks is None or name in tasks}
        features = len(self._trunk.steps) - 2
        wanted = {step for model in asked.values() for step in (model.reads if model is not None else (features,))}
        outputs = dict(self._trunk.outputs(images, wanted))
        distinct = {model.shared_key: model for model in asked.values() if model is not None}
        shared = {key: model.condense(outputs) for key, model in distinct.items()}
        return {
            name: (
                self._trunk.run(outputs[features], features + 1)
                if model is None
                else model.own_part(images, shared[model.shared_key])
            )
            for name, model in asked.items()
        }
