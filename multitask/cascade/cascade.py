"""A cascade and its operating points: which answers they give, and what these cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from multitask.cascade.costs import Costs, cost_text
from multitask.cascade.errors import CascadeError
from multitask.cascade.greedy import Stage
from multitask.cascade.predictions import Predictions


@dataclass(frozen=True)
class Answers:
    """The answers of a cascade for n images."""

    labels: NDArray[np.int64]
    """Answered class of each image, shape (n,)."""
    stages: NDArray[np.int64]
    """Number of the stage that answered each image, from 0, shape (n,)."""
    costs: NDArray[np.float64]
    """Cost of all stages that each image went through, shape (n,)."""
    logits: NDArray[np.float32]
    """Logits of the model that answered each image, shape (n, classes)."""


@dataclass(frozen=True)
class OperatingPoint:
    """A list of stages. It gives one point on the curve of accuracy against cost."""

    relative_accuracy: float
    """Target of the construction: accuracy on the fitting data, divided by the accuracy of the reference."""
    stages: tuple[Stage, ...]

    @property
    def images(self) -> int:
        """Number of images of the fitting data."""
        return sum(stage.answered for stage in self.stages)

    @property
    def accuracy(self) -> float:
        """Share of right answers on the fitting data."""
        return sum(stage.right for stage in self.stages) / self.images

    @property
    def costs_of_stages(self) -> tuple[float, ...]:
        """Total cost of an image for each stage that may answer it."""
        return tuple(accumulate(stage.cost for stage in self.stages))

    @property
    def mean_cost(self) -> float:
        """Mean cost of an image of the fitting data."""
        return self._mean(self.costs_of_stages)

    @property
    def worst_cost(self) -> float:
        """Cost of an image that goes through all stages."""
        return self.costs_of_stages[-1]

    def mean_in(self, costs: Costs) -> float:
        """Return the mean cost of an image of the fitting data in the unit of `costs`."""
        models = [stage.model for stage in self.stages]
        return self._mean(tuple(accumulate(costs.after(model, models[:place]) for place, model in enumerate(models))))

    def answer(self, count: int, classes: int, ask: Callable[[int, NDArray[np.int64]], NDArray[np.float32]]) -> Answers:
        """Answer images. Each image goes through the stages until one of them is sure.

        Args:
            count: number of images.
            classes: number of classes.
            ask: returns the logits, shape (m, classes), of a stage's model. It gets the number of the stage, and the
                positions, shape (m,), of the images that no earlier stage answered.
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
        """Return the mean cost of an image of the fitting data, given the total cost up to each stage."""
        return (
            sum(cost * stage.answered for cost, stage in zip(costs_of_stages, self.stages, strict=True)) / self.images
        )


@dataclass(frozen=True)
class Cascade:
    """Models, costs and operating points, as `fit` returns them. `save_package` writes a cascade with its bundles."""

    points: tuple[OperatingPoint, ...]
    """Operating points in the order of their mean cost, from low to high."""
    asked: int
    """Index in `points` of the operating point that `fit` was asked for."""
    reference: str
    """The model that the accuracy of the cascade is compared with."""
    costs: Costs
    slack: float = 0.0
    """The `slack` of the fit."""
    latency: Costs | None = None
    """Milliseconds of an image for each model, if they were measured."""
    fitted_on: tuple[str, ...] = ()
    """Fingerprints of some images of the fitting data, with the logits of the reference."""

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that at least one stage uses, sorted."""
        return tuple(sorted({stage.model for point in self.points for stage in point.stages}))

    def point(self, max_cost: float | None = None, max_latency_ms: float | None = None) -> OperatingPoint:
        """Return the most accurate operating point within a budget or, without one, the point that was asked for.

        Args:
            max_cost: largest mean cost of an image on the fitting data, in the unit of `costs`. An image that goes
                through all stages costs more (`worst_cost`).
            max_latency_ms: largest mean time of an image, on the device and with the batch size that `latency` was
                measured with.
        Raises:
            CascadeError: no operating point is within the budget, or no latency was measured.
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
    """Return which images a stage answers, shape (n,), given the logits of its model, shape (n, classes)."""
    if stage.threshold is None:
        return np.ones(len(logits), dtype=np.bool_)
    return stage.rule.scores(logits) >= stage.threshold


def _within(points: Sequence[OperatingPoint], costs: Sequence[float], budget: float, unit: str) -> list[OperatingPoint]:
    """Return the operating points whose costs are within the budget.

    Raises:
        CascadeError: there are none.
    """
    fitting = [point for point, cost in zip(points, costs, strict=True) if cost <= budget]
    if not fitting:
        raise CascadeError(
            f"Found no operating point within {cost_text(budget, unit)} {unit} an image: the cheapest takes "
            f"{cost_text(min(costs), unit)} on average. Raise the budget, or fit with a cheaper model."
        )
    return fitting


def answers_of(point: OperatingPoint, predictions: Predictions) -> Answers:
    """Return the answers of an operating point, computed from the known predictions of its models.

    Raises:
        CascadeError: the predictions of a stage's model are missing.
    """
    logits = predictions.only(list({stage.model: None for stage in point.stages})).logits
    return point.answer(
        len(predictions), predictions.classes, lambda number, places: logits[point.stages[number].model][places]
    )
