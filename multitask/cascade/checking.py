"""What a cascade is worth on images that its thresholds never saw."""

import math
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from multitask.cascade.cascade import Cascade, OperatingPoint, answers_of
from multitask.cascade.costs import Costs
from multitask.cascade.errors import CascadeError
from multitask.cascade.fitting import fit
from multitask.cascade.predictions import Predictions

CONFIDENCE_Z = 1.96
"""Standard errors on each side of a mean: 95 % of a normal distribution."""
ABOUT_EQUAL = 0.003
"""A single model counts as about as accurate as the cascade down to this share of images below it."""


@dataclass(frozen=True)
class Interval:
    """A mean over images with its 95 % confidence interval (normal approximation)."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: NDArray[Any], scale: float = 1.0) -> "Interval":
        """Args:
        values: shape (n,), one for each image.
        scale: what each is multiplied by.
        """
        mean = float(values.mean()) * scale
        margin = CONFIDENCE_Z * float(values.std()) * abs(scale) / math.sqrt(len(values))
        return cls(mean, mean - margin, mean + margin)


@dataclass(frozen=True)
class Single:
    """One model alone."""

    model: str
    accuracy: float
    cost: float


@dataclass(frozen=True)
class StageShare:
    """What one stage did."""

    model: str
    rule: str
    """In words, with the threshold."""
    share: float
    """Of all images, that it answered."""
    accuracy: float | None
    """On those; None where there are none."""


@dataclass(frozen=True)
class Check:
    """A cascade measured on images; accuracies are shares of right answers."""

    images: int
    unit: str
    accuracy: Interval
    mean_cost: Interval
    reference: Single
    accuracy_gain: Interval
    """Over the reference, image by image."""
    saving: Interval
    """Share of the reference's cost."""
    equal: Single
    """The cheapest single model at most 0.3 points less accurate than the cascade; the reference if there is none."""
    saving_against_equal: Interval
    stages: tuple[StageShare, ...]
    singles: tuple[Single, ...]
    """Every model of the pool, from cheap to dear."""
    curve: tuple[tuple[float, float], ...]
    """Mean cost and accuracy of each operating point."""


def check(cascade: Cascade, predictions: Predictions, point: OperatingPoint | None = None) -> Check:
    """Measure a cascade.

    Args:
        predictions: of its models and its reference, on images that it was not fitted on.
        point: the one asked for by default.
    Raises:
        CascadeError: it was fitted on some of these images, or a model is missing.
    """
    point = cascade.point() if point is None else point
    needed = predictions.only([cascade.reference, *cascade.models])
    if not set(cascade.fitted_on).isdisjoint(needed.fingerprints(cascade.reference, range(len(needed)))):
        raise CascadeError(
            "Among these images are those that the thresholds were fitted on, on which a cascade looks better than it "
            "is. Use predictions on other images, such as the test split."
        )
    return _check(cascade, predictions, point)


def fit_and_check(predictions: Predictions, costs: Costs, seed: int = 0, **options: Any) -> tuple[Cascade, Check]:
    """Fit on a random half of validation data, and measure on the other half.

    Args:
        options: as for `fit`.
    """
    fitting, untouched = predictions.halves(seed)
    cascade = fit(fitting, costs, **options)
    return cascade, check(cascade, untouched)


def _check(cascade: Cascade, predictions: Predictions, point: OperatingPoint) -> Check:
    costs = cascade.costs
    answers = answers_of(point, predictions)
    right = answers.labels == predictions.labels
    known = [model for model in predictions.logits if model in costs.alone]
    singles = [Single(model, float(predictions.right(model).mean()), costs.alone[model]) for model in known]
    singles.sort(key=lambda single: (single.cost, single.model))
    reference = next(single for single in singles if single.model == cascade.reference)
    near = [single for single in singles if single.accuracy >= right.mean() - ABOUT_EQUAL]
    equal = near[0] if near else reference
    every = [answers_of(other, predictions) for other in cascade.points]
    return Check(
        images=len(predictions),
        unit=costs.unit,
        accuracy=Interval.of(right),
        mean_cost=Interval.of(answers.costs),
        reference=reference,
        accuracy_gain=Interval.of(right.astype(int) - predictions.right(cascade.reference)),
        saving=Interval.of(reference.cost - answers.costs, 1 / reference.cost),
        equal=equal,
        saving_against_equal=Interval.of(equal.cost - answers.costs, 1 / equal.cost),
        stages=tuple(
            StageShare(
                model=stage.model,
                rule="always answers" if stage.threshold is None else stage.rule.threshold_text(stage.threshold),
                share=float((answers.stages == number).mean()),
                accuracy=float(right[answers.stages == number].mean()) if (answers.stages == number).any() else None,
            )
            for number, stage in enumerate(point.stages)
        ),
        singles=tuple(singles),
        curve=tuple((float(one.costs.mean()), float((one.labels == predictions.labels).mean())) for one in every),
    )
