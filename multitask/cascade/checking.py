"""Measuring a cascade on images that it was not fitted on."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from multitask.cascade.cascade import Cascade, OperatingPoint, answers_of
from multitask.cascade.costs import Costs
from multitask.cascade.errors import CascadeError
from multitask.cascade.fitting import fit
from multitask.cascade.predictions import Predictions

CONFIDENCE_Z = 1.96
"""Number of standard errors on each side of a mean that contain 95 % of a normal distribution."""
ABOUT_EQUAL = 0.003
"""Largest share of images by which a single model may be less accurate than the cascade and still count as equal."""


@dataclass(frozen=True)
class Interval:
    """A mean over images, with its 95 % confidence interval.

    The normal approximation gives an interval of no width where few images all have one value. Neither of these does.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of_share(cls, hits: NDArray[np.bool_]) -> "Interval":
        """Compute the interval of a share.

        Args:
            hits: whether each image counts, shape (n,).
        Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927.
        """
        count, share = len(hits), float(hits.mean())
        weight = CONFIDENCE_Z**2 / count
        centre = (share + weight / 2) / (1 + weight)
        margin = CONFIDENCE_Z / (1 + weight) * math.sqrt(share * (1 - share) / count + weight / (4 * count))
        # The rounding of floats may leave the mean of a share of 0 or 1 outside.
        return cls(share, min(centre - margin, share), max(centre + margin, share))

    @classmethod
    def of_mean(cls, values: NDArray[Any], smallest: float, largest: float) -> "Interval":
        """Compute the interval of a mean.

        It is the normal approximation after one image with the smallest and one with the largest value are added.

        Args:
            values: one value for each image, shape (n,).
            smallest, largest: the values between which those of any image are.
        Source: for a difference of two models, whose values are -1, 0 and 1: Bonett and Price, "Adjusted Wald
            Confidence Interval for a Difference of Binomial Proportions Based on Paired Data", J. Educational and
            Behavioral Statistics 2012. We use it for mean costs too, whose values are those of the stages.
        """
        mean = float(values.mean())
        adjusted = np.append(values, [smallest, largest]).astype(np.float64)
        margin = CONFIDENCE_Z * float(adjusted.std()) / math.sqrt(len(adjusted))
        low, high = float(adjusted.mean()) - margin, float(adjusted.mean()) + margin
        return cls(mean, max(smallest, min(low, mean)), min(largest, max(high, mean)))


@dataclass(frozen=True)
class Single:
    """Accuracy and cost of one model alone."""

    model: str
    accuracy: float
    cost: float


@dataclass(frozen=True)
class StageShare:
    """The part that one stage had in the answers."""

    model: str
    rule: str
    """The rule and its threshold in words."""
    share: float
    """Share of all images that the stage answered."""
    accuracy: float | None
    """Accuracy on the images that the stage answered, or None if it answered none."""


@dataclass(frozen=True)
class Check:
    """Measurements of a cascade on images. An accuracy is a share of right answers."""

    images: int
    unit: str
    accuracy: Interval
    mean_cost: Interval
    reference: Single
    accuracy_gain: Interval
    """Accuracy of the cascade minus accuracy of the reference, compared image by image."""
    saving: Interval
    """Saved cost as a share of the reference's cost."""
    equal: Single
    """The cheapest single model that is at most 0.3 points less accurate than the cascade, or else the reference."""
    saving_against_equal: Interval
    """Saved cost as a share of the cost of `equal`."""
    stages: tuple[StageShare, ...]
    singles: tuple[Single, ...]
    """All models of the pool, in the order of their cost."""
    curve: tuple[tuple[float, float], ...]
    """Mean cost and accuracy of each operating point."""


def check(cascade: Cascade, predictions: Predictions, point: OperatingPoint | None = None) -> Check:
    """Measure a cascade.

    Args:
        cascade: the cascade.
        predictions: predictions of its models and its reference, on images that it was not fitted on.
        point: operating point to measure. None means the point that `fit` was asked for.
    Raises:
        CascadeError: the cascade was fitted on some of these images, or the predictions of a model are missing.
    """
    point = cascade.point() if point is None else point
    needed = predictions.only([cascade.reference, *cascade.models])
    if not set(cascade.fitted_on).isdisjoint(needed.fingerprints(cascade.reference, range(len(needed)))):
        raise CascadeError(
            "Among these images are some that the thresholds were fitted on. A cascade looks better on them than it "
            "is. Use predictions on other images, such as the test split."
        )
    return _check(cascade, predictions, point)


def fit_and_check(predictions: Predictions, costs: Costs, seed: int = 0, **options: Any) -> tuple[Cascade, Check]:
    """Fit a cascade on a random half of the predictions, and measure it on the other half.

    Args:
        predictions: predictions of a pool of models, on validation images.
        costs: cost of each model.
        seed: seed of the random half.
        options: the other arguments of `fit`.
    """
    fitting, untouched = predictions.halves(seed)
    cascade = fit(fitting, costs, **options)
    return cascade, check(cascade, untouched)


def _check(cascade: Cascade, predictions: Predictions, point: OperatingPoint) -> Check:
    """Measure an operating point, whatever images the cascade was fitted on."""
    costs = cascade.costs
    answers = answers_of(point, predictions)
    right = answers.labels == predictions.labels
    known = [model for model in predictions.logits if model in costs.alone]
    singles = [Single(model, float(predictions.right(model).mean()), costs.alone[model]) for model in known]
    singles.sort(key=lambda single: (single.cost, single.model))
    reference = next(single for single in singles if single.model == cascade.reference)
    near = [single for single in singles if single.accuracy >= right.mean() - ABOUT_EQUAL]
    equal = near[0] if near else reference
    answers_of_points = [answers_of(other, predictions) for other in cascade.points]
    cheapest, dearest = point.costs_of_stages[0], point.costs_of_stages[-1]
    # The reference alone never differs from itself.
    apart = int([stage.model for stage in point.stages] != [cascade.reference])

    def saving(single: Single) -> Interval:
        return Interval.of_mean(1 - answers.costs / single.cost, 1 - dearest / single.cost, 1 - cheapest / single.cost)

    return Check(
        images=len(predictions),
        unit=costs.unit,
        accuracy=Interval.of_share(right),
        mean_cost=Interval.of_mean(answers.costs, cheapest, dearest),
        reference=reference,
        accuracy_gain=Interval.of_mean(right.astype(int) - predictions.right(cascade.reference), -apart, apart),
        saving=saving(reference),
        equal=equal,
        saving_against_equal=saving(equal),
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
        curve=tuple(
            (float(one.costs.mean()), float((one.labels == predictions.labels).mean())) for one in answers_of_points
        ),
    )
