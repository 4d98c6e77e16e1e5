"""Many tasks over one backbone in memory. The steps that they share are computed once."""

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patches.backbone import Backbone, load_backbone
from patches.bundle import inspect_bundle, load_bundle
from patches.errors import BundleError, ImageError, PatchError
from patches.images.preprocessing import Preprocessing
from patches.model import PatchedModel
from patches.names import unknown_name_message
from patches.prediction import Answer, answer_in_batches, answers_of

if TYPE_CHECKING:
    from patches.images.reading import ImageLike

BATCH_SIZE = 64
"""Number of images in one forward pass of a prediction: that of an evaluation, unless its task has another one."""


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

    @property
    def models(self) -> dict[str, PatchedModel]:
        """Task -> its model, for the tasks that have a patch."""
        return {name: model for name, model in self._models.items() if model is not None}

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

    def classes(self, task: str | None = None) -> tuple[str, ...]:
        """Return the names of a task's classes, in the order of its logits.

        Args:
            task: name of the task. It may be left out if the bank has only one.
        Raises:
            PatchError: the bank has no such task, or does not know its classes.
        """
        name, model = self._one(task)
        if model.classes is None:
            raise PatchError(_unknown(name, "class names"))
        return model.classes

    def preprocessing(self, task: str | None = None) -> Preprocessing:
        """Return how an image becomes the input of a task's network.

        Args:
            task: name of the task. It may be left out if the bank has only one.
        Raises:
            PatchError: the bank has no such task, or does not know its preprocessing.
        """
        name, model = self._one(task)
        if model.preprocessing is None:
            raise PatchError(_unknown(name, "preprocessing"))
        try:
            return Preprocessing.from_json(model.preprocessing)
        except PatchError as error:
            raise PatchError(f"Task '{name}': {error}") from error

    def predict(
        self, images: "Iterable[ImageLike]", task: str | None = None, *, batch_size: int = BATCH_SIZE
    ) -> list[Answer]:
        """Answer images of any size. Files are read and decoded on threads while the network computes.

        The images are decoded and resized as in training and evaluation. With the batch size and the number of torch's
        threads of an evaluation, the logits have the bits of that evaluation.

        Args:
            images: for each image its path, the bytes of its file, an image of Pillow, or its pixels: a tensor of shape
                (3, height, width), uint8.
            task: name of the task that answers. It may be left out if the bank has only one.
            batch_size: number of images in one forward pass.
        Returns:
            An answer for each image, in their order.
        Raises:
            ImageError: an image cannot be decoded. The message names it.
            PatchError: the task is unknown, or its classes or its preprocessing are.
        """
        answers = []
        for answer in self.answers(images, task, batch_size=batch_size):
            if isinstance(answer, ImageError):
                raise answer
            answers.append(answer)
        return answers

    def answers(
        self, images: "Iterable[ImageLike]", task: str | None = None, *, batch_size: int = BATCH_SIZE
    ) -> Iterator[Answer | ImageError]:
        """Yield the answers that `predict` returns, batch by batch, for more images than fit in memory.

        An image that cannot be decoded gives its error in place of an answer, and the other images are answered.
        """
        # torchvision is needed for images alone, and an edge device does without it.
        from patches.images.reading import read_squares
        from patches.images.resizing import network_input

        if isinstance(images, str | bytes | os.PathLike):
            raise PatchError(f"Expected a list of images, found a single {type(images).__name__}. Pass it in a list.")
        if batch_size < 1:
            raise PatchError(f"batch_size is {batch_size}, expected 1 or more.")
        name, classes, preprocessing = self._one(task)[0], self.classes(task), self.preprocessing(task)
        device = next(self.backbone.network.parameters()).device

        def answer(squares: list[Tensor]) -> list[Answer]:
            inputs = network_input(torch.stack(squares), preprocessing, device)
            return answers_of([name] * len(squares), classes, self.all_tasks(inputs, [name])[name])

        return answer_in_batches(read_squares(images, preprocessing), batch_size, answer)

    def _one(self, task: str | None) -> tuple[str, PatchedModel]:
        """Return the name and the model of a task that has a patch; without a name, those of the only task.

        Raises:
            PatchError: there is no such task, or it is the backbone itself, or there are several and no name.
        """
        if task is None and len(self._models) != 1:
            raise PatchError(
                f"Expected the name of the task that answers, because there are {len(self._models)}: "
                f"{', '.join(self._models)}. Name one of them: `--task NAME` on the command line, `task=` in Python."
            )
        name = self.tasks[0] if task is None else task
        if name not in self._models:
            raise PatchError(unknown_name_message("task of this bank", name, self._models))
        model = self._models[name]
        if model is None:
            raise PatchError(_unknown(name, "class names and no preprocessing"))
        return name, model


def open_export(folder: str | os.PathLike[str]) -> PatchBank:
    """Load an exported backbone and all bundles in the same folder. A task has the name of its bundle's file.

    Raises:
        BundleError: the folder has no bundles or no backbone, or a bundle is damaged or does not fit the backbone.
        BackboneError: the backbone cannot be built from its weights.
    """
    weights, bundles = Path(folder) / "backbone.safetensors", sorted(Path(folder).glob("*.patch"))
    if not bundles or not weights.is_file():
        raise BundleError(
            f"'{folder}': expected a folder with backbone.safetensors and bundles (.patch), found no such files. Run "
            "`multitask export RUN`, and name the folder that it writes (RUN/export)."
        )
    architecture = inspect_bundle(bundles[0]).backbone
    bank = PatchBank(load_backbone(architecture["name"], weights, **architecture["options"]))
    for bundle in bundles:
        bank.add(bundle.stem, bundle)
    return bank


def _unknown(task: str, what: str) -> str:
    return (
        f"Task '{task}' has no {what}: they come from a bundle, and it was added without one. Save its model as a "
        "bundle (patches.save_bundle) and add the bundle's path."
    )
