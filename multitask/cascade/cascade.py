"""A cascade: its operating points, what they answer and what they cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from multitask.cascade.costs import Costs
from multitask.cascade.errors import CascadeError
from multitask.cascade.greedy import Stage
from multitask.cascade.predictions import Predictions


@dataclass(frozen=True)
class Answers:
    """What a cascade says of images."""

    labels: NDArray[np.int64]
    """Shape (n,): the answers."""
    stages: NDArray[np.int64]
    """Shape (n,): number of the stage that answered, from 0."""
    costs: NDArray[np.float64]
    """Shape (n,): of all stages that an image went through."""
    logits: NDArray[np.float32]
    """Shape (n, classes): of the model that answered."""


@dataclass(frozen=True)
class OperatingPoint:
    """One list of stages: one place on the curve of accuracy against cost."""

    relative_accuracy: float
    """What it was built for: accuracy on the fitting data over the reference's."""
    stages: tuple[Stage, ...]

    @property
    def images(self) -> int:
        """Of the fitting data."""
        return sum(stage.answered for stage in self.stages)

    @property
    def accuracy(self) -> float:
        """Share of right answers on the fitting data."""
        return sum(stage.right for stage in self.stages) / self.images

    @property
    def costs_of_stages(self) -> tuple[float, ...]:
        """What an image has cost when each stage answers it."""
        return tuple(accumulate(stage.cost for stage in self.stages))

    @property
    def mean_cost(self) -> float:
        """Of an image of the fitting data."""
        return self._mean(self.costs_of_stages)

    @property
    def worst_cost(self) -> float:
        """Of an image that goes through all stages."""
        return self.costs_of_stages[-1]

    def mean_in(self, costs: Costs) -> float:
        """`mean_cost` in another unit."""
        models = [stage.model for stage in self.stages]
        return self._mean(tuple(accumulate(costs.after(model, models[:place]) for place, model in enumerate(models))))

    def answer(self, count: int, classes: int, ask: Callable[[int, NDArray[np.int64]], NDArray[np.float32]]) -> Answers:
        """Go through the stages with images, each of which leaves at the first stage that is sure.

        Args:
            count: how many images.
            ask: from a stage's number and the places (m,) of the images that have come so far, which are ever fewer, to
                its model's logits (m, classes).
        """
        stages = np.zeros(count, dtype=np.int64)
        logits = np.zeros((count, classes), dtype=np.float32)
        places = np.arange(count)
        for number, stage in enumerate(self.stages):
            if not len(places):
                break
            found = ask(number, places)
            sure = _is_sure(stage, found)
            logits[places[sure]] = found[sure]
            stages[places[sure]] = number
            places = places[~sure]
        return Answers(logits.argmax(axis=1), stages, np.array(self.costs_of_stages)[stages], logits)

    def _mean(self, costs_of_stages: Sequence[float]) -> float:
        return (
            sum(cost * stage.answered for cost, stage in zip(costs_of_stages, self.stages, strict=True)) / self.images
        )


@dataclass(frozen=True)
class Cascade:
    """What `fit` makes: models, costs and operating points. `save_package` writes it with its bundles."""

    points: tuple[OperatingPoint, ...]
    """From cheap to dear."""
    asked: int
    """Which of them is what was asked for."""
    reference: str
    """The model whose accuracy counts."""
    costs: Costs
    slack: float = 0.0
    latency: Costs | None = None
    """Milliseconds of an image, where they were measured."""
    fitted_on: tuple[str, ...] = ()
    """Fingerprints of some of the images that the thresholds come from, with the reference's logits."""

    @property
    def models(self) -> tuple[str, ...]:
        """Those that some stage uses, by name."""
        return tuple(sorted({stage.model for point in self.points for stage in point.stages}))

    def point(self, max_cost: float | None = None, max_latency_ms: float | None = None) -> OperatingPoint:
        """The operating point that was asked for, or the most accurate one within a budget.

        Args:
            max_cost: of an image on average, in the unit of `costs`, as on the fitting data; an image that goes through
                all stages costs more (`worst_cost`).
            max_latency_ms: of an image on average, on the device and with the batch that `latency` was measured with.
        Raises:
            CascadeError: no operating point is so cheap, or no latency was measured.
        """
        if max_cost is None and max_latency_ms is None:
            return self.points[self.asked]
        fitting = list(self.points)
        if max_cost is not None:
            fitting = _within(fitting, [point.mean_cost for point in fitting], max_cost, self.costs.unit)
        if max_latency_ms is not None:
            if self.latency is None:
                raise CascadeError(
                    "max_latency_ms is given, but this cascade knows no latency. Fit it with a measured latency "
                    "(latency=measure_latency(...), or `multitask cascade fit --latency`), or give max_cost."
                )
            means = [point.mean_in(self.latency) for point in fitting]
            fitting = _within(fitting, means, max_latency_ms, self.latency.unit)
        return max(fitting, key=lambda point: (point.accuracy, -point.mean_cost))


def _is_sure(stage: Stage, logits: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Which images a stage answers, shape (n,), from its model's logits, shape (n, classes)."""
    if stage.threshold is None:
        return np.ones(len(logits), dtype=np.bool_)
    return stage.rule.scores(logits) >= stage.threshold


def _within(points: Sequence[OperatingPoint], costs: Sequence[float], budget: float, unit: str) -> list[OperatingPoint]:
    fitting = [point for point, cost in zip(points, costs, strict=True) if cost <= budget]
    if not fitting:
        raise CascadeError(
            f"Found no operating point within {budget:g} {unit} an image: the cheapest takes {min(costs):g} on "
            "average. Raise the budget, or fit with a cheaper model."
        )
    return fitting


def answers_of(point: OperatingPoint, predictions: Predictions) -> Answers:
    """What an operating point says of images whose predictions are known.

    Raises:
        CascadeError: those of a stage's model are missing.
    """
    logits = predictions.only(list({stage.model: None for stage in point.stages})).logits
    return point.answer(
        len(predictions), predictions.classes, lambda number, places: logits[point.stages[number].model][places]
    )
