"""Costs of the models of a pool: counted operations, measured time, or a column of a user's file.

Models on one backbone that see the same pixels share the first steps of the backbone, up to the first step that a patch
changes. A cascade that asks several of these models computes and pays the shared steps once.
"""

import csv
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from multitask.cascade.errors import CascadeError
from patches.images.preprocessing import Preprocessing
from patches.names import unknown_name_message
from patches.patch import PatchedModel
from patches.quoting import shortened

MACS, MILLISECONDS = "MACs", "ms"


@dataclass(frozen=True)
class Costs:
    """Cost of one image for each model, alone and after other models."""

    unit: str
    alone: Mapping[str, float]
    """Model -> cost of one image."""
    shared: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Pair of models, in either order -> the part of the cost that both have in common."""

    def __post_init__(self) -> None:
        for model, cost in self.alone.items():
            if not (math.isfinite(cost) and cost > 0):
                raise CascadeError(
                    f"Model '{shortened(model)}': found a cost of {cost} {shortened(self.unit)}, expected a number "
                    "above 0. Correct it."
                )

    def after(self, model: str, asked: Sequence[str]) -> float:
        """Return the cost of a model for an image after other models were asked: 0 if it was one of them."""
        if model in asked:
            return 0.0
        common = (self.shared.get((model, other), self.shared.get((other, model), 0.0)) for other in asked)
        return self.alone[model] - max(common, default=0.0)

    def check(self, models: Sequence[str]) -> None:
        """Check that every model has a cost.

        Raises:
            CascadeError: a model has none.
        """
        for model in models:
            if model not in self.alone:
                raise CascadeError(unknown_name_message("model in the costs", model, self.alone))


def count_macs(models: Mapping[str, PatchedModel], views: Mapping[str, Preprocessing]) -> Costs:
    """Count the multiply-accumulates (MACs) of convolutions, linear layers and attention, with torch's own counter.

    The counter counts a multiplication and an addition as two operations (FLOPs). A MAC is one of each, so MACs =
    FLOPs / 2. Normalisation, activations, pooling, resizing and the rule itself are not counted.

    Args:
        models: models on one backbone, in eval mode.
        views: preprocessing of each model.
    """
    return _costs(MACS, models, views, lambda call, view: _macs(call, torch.zeros(_shape(1, view))))


def measure_latency(
    models: Mapping[str, PatchedModel],
    views: Mapping[str, Preprocessing],
    device: torch.device | str | None = None,
    batch_size: int = 64,
    repeats: int = 7,
) -> Costs:
    """Measure the milliseconds that each model takes for an image, with the current number of torch threads.

    Args:
        models: models on one backbone, in eval mode, on `device`.
        views: preprocessing of each model.
        device: device of the models. None means the CPU.
        batch_size: number of images in a batch. In small batches, an image costs more.
        repeats: number of batches. The result is their median.
    """

    def milliseconds(call: Callable[[torch.Tensor], Any], view: Preprocessing) -> float:
        images = torch.zeros(_shape(batch_size, view), device=device).contiguous(memory_format=torch.channels_last)
        seconds = []
        for _ in range(repeats + 2):  # the first two calls only warm up
            start = time.perf_counter()
            call(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return 1000 * statistics.median(seconds[2:]) / batch_size

    return _costs(MILLISECONDS, models, views, milliseconds)


def read_costs(path: str | os.PathLike[str], column: str) -> Costs:
    """Read costs from a CSV file, for example energy or price. Models share no part of these costs.

    Args:
        path: the file. Its header names the column `model` and at least one other column.
        column: the column of costs. Its name becomes the unit.
    Raises:
        CascadeError: a column is missing, or a cost is not a number.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        for name in ("model", column):
            if name not in (rows.fieldnames or ()):
                raise CascadeError(unknown_name_message(f"column of '{path}'", name, rows.fieldnames or ()))
        costs = {}
        for row in rows:
            try:
                costs[row["model"]] = float(row[column])
            except (TypeError, ValueError) as error:
                raise CascadeError(
                    f"'{path}', model '{row['model']}': found {row[column]!r} as {column}, expected a number. "
                    "Correct it."
                ) from error
    return Costs(column, costs)


def cost_text(cost: float, unit: str) -> str:
    """Return a cost for people, without its unit: 300.8M for 300,774,272 MACs, and 0.1235 for 0.12345 milliseconds."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if unit == MACS else ():
        if cost >= scale:
            return f"{cost / scale:.4g}{letter}"
    return f"{cost:,.0f}" if cost >= 1e4 else f"{cost:.4g}"


def shared_steps(one: PatchedModel, other: PatchedModel) -> int:
    """Return how many first steps of the backbone two models share if they see the same pixels."""
    return min(one.first_private_block, other.first_private_block)


def _costs(
    unit: str,
    models: Mapping[str, PatchedModel],
    views: Mapping[str, Preprocessing],
    measure: Callable[[Callable[[torch.Tensor], Any], Preprocessing], float],
) -> Costs:
    """Measure each model, and each part of the backbone that two models share.

    Args:
        unit: unit of the costs.
        models: models on one backbone.
        views: preprocessing of each model.
        measure: returns the cost of calling a function with images of one preprocessing.
    """
    with torch.no_grad():
        alone = {name: measure(model, views[name]) for name, model in models.items()}
        prefixes: dict[tuple[Preprocessing, int], float] = {}
        shared = {}
        for one in sorted(models):
            for other in sorted(models):
                stop, view = shared_steps(models[one], models[other]), views[one]
                if one < other and view == views[other] and stop > 0:
                    if (view, stop) not in prefixes:
                        trunk = models[one].backbone.frozen()
                        prefixes[view, stop] = measure(lambda x, trunk=trunk, stop=stop: trunk.run(x, 0, stop), view)  # type: ignore[misc]
                    # A measured time of a long prefix may exceed the measured time of the whole model.
                    shared[one, other] = min(prefixes[view, stop], alone[one], alone[other])
    return Costs(unit, alone, shared)


def _macs(call: Callable[[torch.Tensor], Any], images: torch.Tensor) -> float:
    """Count the multiply-accumulates of one call."""
    with _plain_attention(), FlopCounterMode(display=False) as counter:
        call(images)
    return counter.get_total_flops() / 2


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Switch off torch's fused transformer layer for inference, whose operations the counter does not see."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _shape(images: int, view: Preprocessing) -> tuple[int, int, int, int]:
    """Return the shape of a batch as a model reads it."""
    return images, 3, view.resolution, view.resolution
