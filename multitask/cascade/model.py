"""A cascade at run time: images in, answers out, and only undecided images go on."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from multitask.cascade.artifact import open_package
from multitask.cascade.cascade import Answers, Cascade, OperatingPoint
from multitask.cascade.costs import View
from multitask.cascade.errors import CascadeError
from multitask.data.transforms import normalise, resize_images
from patches.backbone import Backbone
from patches.patch import PatchedModel


class CascadeModel:
    """A cascade with its models on one backbone.

    Each stage sees the images that no stage before it has answered, at its own resolution. Models that see the same
    pixels go on from the shared steps that an earlier one has computed.
    """

    def __init__(self, cascade: Cascade, models: Mapping[str, PatchedModel], views: Mapping[str, View]) -> None:
        """Args:
        models: at least those of `cascade`, on one backbone; they are put into eval mode.
        views: how each of them sees an image.
        Raises:
            CascadeError: a model of the cascade is missing, or they stand on several backbones.
        """
        missing = [name for name in cascade.models if name not in models or name not in views]
        if missing:
            raise CascadeError(f"The cascade needs the models {', '.join(missing)}, which are not there. Add them.")
        self.cascade = cascade
        self._models = {name: models[name].eval() for name in cascade.models}
        self._views = {name: views[name] for name in cascade.models}
        backbones = {id(model.backbone): model.backbone for model in self._models.values()}
        if len(backbones) > 1:
            raise CascadeError("The cascade's models stand on several backbones. Attach all of them to one.")
        self._trunk = next(iter(backbones.values())).frozen()
        self._device = next(self._trunk.network.parameters()).device
        self.num_classes = next(iter(self._models.values())).num_classes

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Self:
        """From a package that `save_package` wrote.

        Raises:
            CascadeError: no package, or its parts do not belong together.
        """
        return cls(*open_package(path, device))

    @torch.no_grad()
    def __call__(
        self, images: Tensor | Sequence[Tensor], *, max_cost: float | None = None, max_latency_ms: float | None = None
    ) -> Answers:
        """Answer images.

        Args:
            images: each of shape (3, height, width), uint8, of any sizes; every stage resizes them itself.
            max_cost: picks the operating point, as `Cascade.point` does.
            max_latency_ms: the same, in milliseconds.
        Raises:
            CascadeError: images of another type, or no operating point within the budget.
        """
        for image in images:
            if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
                raise CascadeError(
                    f"Found an image of shape {list(image.shape)} and type {image.dtype}, expected [3, height, width] "
                    "and uint8: pixels before they are resized and normalised."
                )
        point = self.cascade.point(max_cost, max_latency_ms)
        undecided = _Undecided(list(images), self._trunk, self._reads(point), self._device)

        def ask(number: int, places: NDArray[np.int64]) -> NDArray[np.float32]:
            still_asked = {stage.model for stage in point.stages[number:]}
            undecided.keep(places, still_asked, {self._views[name] for name in still_asked})
            model = point.stages[number].model
            return undecided.ask(model, self._models[model], self._views[model])

        return point.answer(len(images), self.num_classes, ask)

    def _reads(self, point: OperatingPoint) -> dict[View, set[int]]:
        """View -> the shared steps whose outputs some model of the point reads."""
        reads: dict[View, set[int]] = {}
        for stage in point.stages:
            reads.setdefault(self._views[stage.model], set()).update(self._models[stage.model].reads)
        return reads


class _Undecided:
    """Images that no stage has answered, and what has been computed of them and is still wanted."""

    def __init__(
        self, images: list[Tensor], trunk: Backbone, reads: Mapping[View, Collection[int]], device: torch.device
    ) -> None:
        self._images, self._trunk, self._reads, self._device = images, trunk, reads, device
        self._places = np.arange(len(images))
        self._seen: dict[View, _Seen] = {}
        self._logits: dict[str, Tensor] = {}

    def keep(self, places: NDArray[np.int64], models: Collection[str], views: Collection[View]) -> None:
        """Leave the images at other places, and what none of these models and views will read."""
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

    def ask(self, name: str, model: PatchedModel, view: View) -> NDArray[np.float32]:
        """A model's logits of all images here, shape (n, classes)."""
        if name not in self._logits:
            if view not in self._seen:
                self._seen[view] = _Seen(_pixels(self._images, view, self._device))
            seen = self._seen[view]
            seen.advance(self._trunk, model.first_private_block, self._reads[view])
            self._logits[name] = model.own_part(seen.images, model.condense(seen.outputs))
        return self._logits[name].float().cpu().numpy()


class _Seen:
    """Images as one view has them, and what the backbone's shared steps gave so far."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.outputs: dict[int, Tensor] = {}
        self._last = images
        self._done = 0

    def advance(self, trunk: Backbone, stop: int, wanted: Collection[int]) -> None:
        """Run the steps up to `stop` that have not run, and keep the outputs of those wanted."""
        for step in range(self._done, stop):
            self._last = trunk.run(self._last, step, step + 1)
            if step in wanted:
                self.outputs[step] = self._last
        self._done = max(self._done, stop)

    def keep(self, chosen: Tensor) -> None:
        self.images, self._last = self.images[chosen], self._last[chosen]
        self.outputs = {step: output[chosen] for step, output in self.outputs.items()}


def _pixels(images: Iterable[Tensor], view: View, device: torch.device) -> Tensor:
    """What a model reads, as evaluation gives it: shape (n, 3, resolution, resolution), channels last in memory."""
    images = list(images)
    pixels = resize_images(images, [view.resolution], len(images))[view.resolution].permute(0, 3, 1, 2)
    return normalise(pixels.to(device), view.mean, view.std).contiguous(memory_format=torch.channels_last)
