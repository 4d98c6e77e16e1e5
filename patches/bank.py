"""Many tasks over one backbone in memory. The steps that they share are computed once."""

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
    """A set of tasks on one frozen backbone, which are answered together.

    The steps before a task's `first_private_block` are shared with the other tasks. With `last_layer` these are all
    steps before the head, with a side network the steps up to the last one that it reads, and with `scale_bias` the
    steps before the first normalisation layer.

    Attributes:
        backbone: the backbone of all tasks.
        trunk: a copy of the backbone's structure over the same storage. It runs the shared steps, always in eval mode.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.trunk = backbone.frozen()
        self._models: dict[str, PatchedModel | None] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order in which they were added."""
        return tuple(self._models)

    def add(self, name: str, patch: PatchedModel | str | os.PathLike[str] | None = None) -> None:
        """Add a task.

        Args:
            name: name of the task, unique in the bank.
            patch: a model attached to this backbone, which is put into eval mode; or the path of a bundle; or None for
                a task that is the backbone itself, with its own head.
        Raises:
            PatchError: the name is taken, or the model does not alias this backbone's tensors.
            BundleError: the bundle cannot be loaded. See `load_bundle`.
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
        """Return the logits of every task for every image, without autograd.

        The shared steps run once, and then each task runs its remaining steps.

        Args:
            images: shape (batch, 3, height, width).
            tasks: names of the tasks to answer, by default all.
        Returns:
            Task -> logits (batch, classes of the task). They have the same bits as the logits that the task's model
            alone computes without autograd.
        Raises:
            PatchError: the bank has no task of that name.
        """
        for name in tasks or ():
            if name not in self._models:
                raise PatchError(unknown_name_message("task of this bank", name, self._models))
        asked = {name: model for name, model in self._models.items() if tasks is None or name in tasks}
        features = len(self.trunk.steps) - 2
        wanted = {step for model in asked.values() for step in (model.reads if model is not None else (features,))}
        outputs = dict(self.trunk.outputs(images, wanted))
        distinct = {model.shared_key: model for model in asked.values() if model is not None}
        shared = {key: model.condense(outputs) for key, model in distinct.items()}
        return {
            name: (
                self.trunk.run(outputs[features], features + 1)
                if model is None
                else model.own_part(images, shared[model.shared_key])
            )
            for name, model in asked.items()
        }
