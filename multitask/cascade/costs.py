"""What it costs to ask each model of a pool: counted operations, measured time, or a column of the user's.

Models on one backbone that see the same pixels share their first steps, up to the first one that a patch changes.
A cascade that has asked one of them pays for those steps once.
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
from multitask.data.batches import BatchView
from patches.names import unknown_name_message
from patches.patch import PatchedModel

MACS, MILLISECONDS = "MACs", "ms"


@dataclass(frozen=True)
class View:
    """How a model sees an image: two models with equal views read the same pixels."""

    resolution: int
    """Height and width, in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, preprocessing: Mapping[str, Any]) -> "View":
        """From what a bundle says of its preprocessing."""
        BatchView(preprocessing["resolution"], preprocessing["mean"], preprocessing["std"])  # checks them
        return cls(preprocessing["resolution"], tuple(preprocessing["mean"]), tuple(preprocessing["std"]))


@dataclass(frozen=True)
class Costs:
    """Cost of an image for each model, alone and after another one."""

    unit: str
    alone: Mapping[str, float]
    """Model -> cost of one image."""
    shared: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Two models, in either order -> the part of the cost that both have in common."""

    def __post_init__(self) -> None:
        for model, cost in self.alone.items():
            if not (math.isfinite(cost) and cost > 0):
                raise CascadeError(
                    f"Model '{model}': found a cost of {cost} {self.unit}, expected a number above 0. Correct it."
                )

    def after(self, model: str, asked: Sequence[str]) -> float:
        """What a model costs for an image when others were asked before: 0 for one of them."""
        if model in asked:
            return 0.0
        common = (self.shared.get((model, other), self.shared.get((other, model), 0.0)) for other in asked)
        return self.alone[model] - max(common, default=0.0)

    def check(self, models: Sequence[str]) -> None:
        """Raises:
        CascadeError: a model has no cost.
        """
        for model in models:
            if model not in self.alone:
                raise CascadeError(unknown_name_message("model in the costs", model, self.alone))


def count_macs(models: Mapping[str, PatchedModel], views: Mapping[str, View]) -> Costs:
    """Multiply-accumulates of convolutions, linear layers and attention, by torch's own counter.

    The counter counts a multiplication and an addition as two operations (FLOPs); a MAC is both: MACs = FLOPs / 2.
    Normalisation, activations, pooling, the resize and the rule itself are not counted.

    Args:
        models: on one backbone, in eval mode.
        views: of each model.
    """
    return _costs(MACS, models, views, lambda call, view: _macs(call, torch.zeros(_shape(1, view))))


def measure_latency(
    models: Mapping[str, PatchedModel],
    views: Mapping[str, View],
    device: torch.device | str | None = None,
    batch_size: int = 64,
    repeats: int = 7,
) -> Costs:
    """Milliseconds of an image on this device, with the threads torch has now: the median over repeats of a batch.

    Args:
        models: on one backbone, in eval mode, on `device`.
        views: of each model.
        batch_size: images at once; a batch of 1 costs more for each.
    """

    def milliseconds(call: Callable[[torch.Tensor], Any], view: View) -> float:
        images = torch.zeros(_shape(batch_size, view), device=device).contiguous(memory_format=torch.channels_last)
        seconds = []
        for _ in range(repeats + 2):  # the first two warm up
            start = time.perf_counter()
            call(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return 1000 * statistics.median(seconds[2:]) / batch_size

    return _costs(MILLISECONDS, models, views, milliseconds)


def read_costs(path: str | os.PathLike[str], column: str) -> Costs:
    """A column of a CSV file: energy, price, or what else a model costs. Nothing is shared then.

    Args:
        path: with a header that names the column `model` and others.
        column: the one to read; it names the unit.
    Raises:
        CascadeError: no such column, or a cost that is no number.
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


def shared_steps(one: PatchedModel, other: PatchedModel) -> int:
    """How many first steps of the backbone two models have in common, where they see the same pixels."""
    return min(one.first_private_block, other.first_private_block)


def _costs(
    unit: str,
    models: Mapping[str, PatchedModel],
    views: Mapping[str, View],
    measure: Callable[[Callable[[torch.Tensor], Any], View], float],
) -> Costs:
    with torch.no_grad():
        alone = {name: measure(model, views[name]) for name, model in models.items()}
        prefixes: dict[tuple[View, int], float] = {}
        shared = {}
        for one in sorted(models):
            for other in sorted(models):
                stop, view = shared_steps(models[one], models[other]), views[one]
                if one < other and view == views[other] and stop > 0:
                    if (view, stop) not in prefixes:
                        trunk = models[one].backbone.frozen()
                        prefixes[view, stop] = measure(lambda x, trunk=trunk, stop=stop: trunk.run(x, 0, stop), view)  # type: ignore[misc]
                    # Measured, a long prefix may come out longer than the whole.
                    shared[one, other] = min(prefixes[view, stop], alone[one], alone[other])
    return Costs(unit, alone, shared)


def _macs(call: Callable[[torch.Tensor], Any], images: torch.Tensor) -> float:
    with _plain_attention(), FlopCounterMode(display=False) as counter:
        call(images)
    return counter.get_total_flops() / 2


@contextmanager
def _plain_attention() -> Iterator[None]:
    """The counter does not see into the fused layer that torch takes for transformers in inference."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _shape(images: int, view: View) -> tuple[int, int, int, int]:
    return images, 3, view.resolution, view.resolution
