"""Running a cascade on images. Each stage sees only the images that no stage before it has answered."""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from multitask.cascade.artifact import open_package
from multitask.cascade.cascade import Answers, Cascade, OperatingPoint
from multitask.cascade.classes import common_classes
from multitask.cascade.errors import CascadeError
from patches.backbone import Backbone
from patches.errors import ImageError
from patches.images.preprocessing import Preprocessing
from patches.images.reading import ImageLike, read_whole
from patches.images.resizing import network_input, resize_images
from patches.patch import PatchedModel
from patches.prediction import Answer, answer_in_batches, answers_of

BATCH_SIZE = 16
"""Number of images that `CascadeModel.answers` has in memory at their full size."""


class CascadeModel:
    """A cascade with its models on one backbone.

    Each stage sees the images that no stage before it has answered, at its own resolution. If models see the same
    pixels, the steps of the backbone that they share are computed once.
    """

    def __init__(
        self, cascade: Cascade, models: Mapping[str, PatchedModel], views: Mapping[str, Preprocessing]
    ) -> None:
        """Args:
        cascade: the cascade.
        models: at least the models of the cascade, all on one backbone. They are put into eval mode.
        views: preprocessing of each model. Models with equal ones see the same pixels.
        Raises:
            CascadeError: a model of the cascade is missing, or the models are on several backbones or have different
                classes.
        """
        missing = [name for name in cascade.models if name not in models or name not in views]
        if missing:
            raise CascadeError(f"The cascade needs the models {', '.join(missing)}, which were not given. Add them.")
        self.cascade = cascade
        self.models = {name: models[name].eval() for name in cascade.models}
        """Models of the cascade, by name."""
        self._views = {name: views[name] for name in cascade.models}
        backbones = {id(model.backbone): model.backbone for model in self.models.values()}
        if len(backbones) > 1:
            raise CascadeError("The cascade's models are on several backbones. Attach all of them to one backbone.")
        self.trunk = next(iter(backbones.values())).frozen()
        """The backbone that runs the steps that models share. It uses the storage of the models' backbone."""
        self._device = next(self.trunk.network.parameters()).device
        self.num_classes = next(iter(self.models.values())).num_classes
        self.classes, self._columns = common_classes({name: model.classes for name, model in self.models.items()})
        """Class names in the order of the answers' labels and logits, or None if no model knows them."""

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Self:
        """Load a package that `save_package` wrote.

        Raises:
            CascadeError: the file is not a package, or its parts do not belong together.
        """
        return cls(*open_package(path, device))

    @torch.no_grad()
    def __call__(
        self, images: Tensor | Sequence[Tensor], *, max_cost: float | None = None, max_latency_ms: float | None = None
    ) -> Answers:
        """Answer images.

        Args:
            images: each of shape (3, height, width), uint8. Images may have different sizes; each stage resizes them.
            max_cost: budget for the operating point, as in `Cascade.point`.
            max_latency_ms: budget in milliseconds, as in `Cascade.point`.
        Raises:
            CascadeError: an image has another type, or no operating point is within the budget.
        """
        for image in images:
            if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
                raise CascadeError(
                    f"Found an image of shape {list(image.shape)} and type {image.dtype}, expected [3, height, width] "
                    "and uint8. Pass the pixels as they are before resizing and normalising."
                )
        point = self.cascade.point(max_cost, max_latency_ms)
        undecided = _Undecided(list(images), self.trunk, self._reads(point), self._device)

        def ask(number: int, places: NDArray[np.int64]) -> NDArray[np.float32]:
            still_asked = {stage.model for stage in point.stages[number:]}
            undecided.keep(places, still_asked, {self._views[name] for name in still_asked})
            model = point.stages[number].model
            logits = undecided.ask(model, self.models[model], self._views[model])
            return logits[:, self._columns[model]] if model in self._columns else logits

        return point.answer(len(images), self.num_classes, ask)

    def answers(self, images: Iterable[ImageLike]) -> Iterator[Answer | ImageError]:
        """Yield the answer to each image, as `PatchBank.answers` does. Its `task` is the model that answered.

        Raises:
            CascadeError: the models have no class names.
        """
        names, stages = self.classes, self.cascade.point().stages
        if names is None:
            raise CascadeError(
                "The cascade's models have no class names. Load it from a package, or set their classes."
            )

        def answer(whole: list[Tensor]) -> list[Answer]:
            found = self(whole)
            tasks = [stages[stage].model for stage in found.stages]
            return answers_of(tasks, names, torch.from_numpy(found.logits))

        return answer_in_batches(read_whole(images), BATCH_SIZE, answer)

    def _reads(self, point: OperatingPoint) -> dict[Preprocessing, set[int]]:
        """Return, for each view, the shared steps whose outputs a model of the operating point reads."""
        reads: dict[Preprocessing, set[int]] = {}
        for stage in point.stages:
            reads.setdefault(self._views[stage.model], set()).update(self.models[stage.model].reads)
        return reads


class _Undecided:
    """The images that no stage has answered, with the results for them that later stages can still use."""

    def __init__(
        self,
        images: list[Tensor],
        trunk: Backbone,
        reads: Mapping[Preprocessing, Collection[int]],
        device: torch.device,
    ) -> None:
        self._images, self._trunk, self._reads, self._device = images, trunk, reads, device
        self._places = np.arange(len(images))
        self._seen: dict[Preprocessing, _Seen] = {}
        self._logits: dict[str, Tensor] = {}

    def keep(self, places: NDArray[np.int64], models: Collection[str], views: Collection[Preprocessing]) -> None:
        """Drop the images at other positions, and the results that the remaining stages do not use.

        Args:
            places: positions of the images to keep, in the original batch.
            models: models that are still asked.
            views: views of these models.
        """
        self._logits = {name: logits for name, logits in self._logits.items() if name in models}
        self._seen = {view: seen for view, seen in self._seen.items() if view in views}
        if len(places) == len(self._places):
            return
        kept = np.searchsorted(self._places, places)
        self._images = [self._images[place] for place in kept]
        chosen = torch.from_numpy(kept).to(self._device)
        self._logits = {name: logits[chosen] for name, logits in self._logits.items()}
        for seen in self._seen.values():
            seen.keep(chosen)
        self._places = places

    def ask(self, name: str, model: PatchedModel, view: Preprocessing) -> NDArray[np.float32]:
        """Return the logits of a model for all undecided images, shape (n, classes)."""
        if name not in self._logits:
            if view not in self._seen:
                self._seen[view] = _Seen(pixels(self._images, view, self._device))
            seen = self._seen[view]
            seen.advance(self._trunk, model.first_private_block, self._reads[view])
            self._logits[name] = model.own_part(seen.images, model.condense(seen.outputs))
        return self._logits[name].float().cpu().numpy()


class _Seen:
    """Images in one view, and the outputs of the backbone's shared steps so far."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.outputs: dict[int, Tensor] = {}
        self._last = images
        self._done = 0

    def advance(self, trunk: Backbone, stop: int, wanted: Collection[int]) -> None:
        """Run the steps before `stop` that have not run yet, and keep the outputs of the wanted ones."""
        for step in range(self._done, stop):
            self._last = trunk.run(self._last, step, step + 1)
            if step in wanted:
                self.outputs[step] = self._last
        self._done = max(self._done, stop)

    def keep(self, chosen: Tensor) -> None:
        """Drop all images except the chosen ones."""
        self.images, self._last = self.images[chosen], self._last[chosen]
        self.outputs = {step: output[chosen] for step, output in self.outputs.items()}


def pixels(images: Sequence[Tensor], view: Preprocessing, device: torch.device) -> Tensor:
    """Return images as a model reads them, equal to those of an evaluation.

    Args:
        images: each of shape (3, height, width), uint8.
        view: preprocessing of the model.
        device: device of the result.
    Returns:
        Shape (n, 3, resolution, resolution), float32, channels last in memory.
    """
    squares_nhwc = resize_images(images, [view.resolution], len(images), view.framing)[view.resolution]
    return network_input(squares_nhwc, view, device)
