"""Fitting a cascade, given the predictions and the costs of a pool of models."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from multitask.cascade.cascade import Cascade, OperatingPoint
from multitask.cascade.costs import Costs, cost_text
from multitask.cascade.errors import CascadeError
from multitask.cascade.greedy import Candidate, Pool
from multitask.cascade.predictions import Predictions
from multitask.cascade.rules import FEATURES, SCORES, Rule, Score, features, fit_predictor, fit_temperature
from patches.names import unknown_name_message

SWEEP = 33
"""Number of accuracy targets that are tried to find the best operating point within a budget."""
REMEMBERED = 32
"""Number of images whose fingerprints a cascade keeps, so that it recognises its fitting data."""


def fit(
    predictions: Predictions,
    costs: Costs,
    *,
    min_relative_accuracy: float = 1.0,
    min_accuracy: float | None = None,
    max_mean_cost: float | None = None,
    reference: str | None = None,
    slack: float = 0.0,
    scores: Sequence[Score] = SCORES,
    operating_points: int = 0,
    latency: Costs | None = None,
) -> Cascade:
    """Build the cheapest cascade for an accuracy, or the most accurate one for a cost, with a greedy construction.

    Accuracies and costs hold on the given images. On new images, thresholds that were fitted without slack miss the
    accuracy by a little, so fit on one part of the validation data and measure on another part (`fit_and_check`).

    Args:
        predictions: predictions of a pool of models, on validation images.
        costs: cost of each model in the pool.
        min_relative_accuracy: target for the accuracy, divided by the reference's: above 0 and at most 1.
        min_accuracy: alternative target: a share of right answers (0 to 1) that the reference reaches.
        max_mean_cost: alternative target: a mean cost of an image. The result is the most accurate cascade within it.
        reference: model that the accuracy is compared with. None means the most accurate model.
        slack: share of its answers on which each stage must be right beyond the target (0.0025: a quarter of a point).
        scores: scores that the rules of stages may use.
        operating_points: number of further targets, evenly spaced down to the accuracy of the cheapest model. Their
            operating points are kept for `Cascade.point(max_cost)`, except those that are worse than another.
        latency: milliseconds of each model, for `Cascade.point(max_latency_ms)`.
    Raises:
        CascadeError: no single model reaches the target, the budget is below the cost of the cheapest model, or costs
            or names do not fit the predictions.
    Source: see `greedy`. Three things differ from the paper: `slack`, an absolute accuracy is turned into a relative
        one, and a stage answers at least one image in a hundred.
    """
    for found in (costs, latency):
        if found is not None:
            found.check(list(predictions.logits))
    right = {model: predictions.right(model) for model in predictions.logits}
    accuracy = {model: float(right[model].mean()) for model in right}
    reference = _reference(reference, accuracy, costs)
    target = _relative(min_relative_accuracy, min_accuracy, reference, accuracy)
    cheapest = _cheapest(right, costs, max_mean_cost)
    pool = Pool(candidates(predictions, scores), right, costs, reference)
    lowest = OperatingPoint(min(1.0, accuracy[cheapest] / accuracy[reference]), (pool.alone(cheapest),))
    asked, others = _operating_points(pool, lowest, target, max_mean_cost, slack, operating_points)
    points = _undominated([asked, *others], asked)
    return Cascade(
        points=tuple(points),
        asked=points.index(asked),
        reference=reference,
        costs=costs,
        slack=slack,
        latency=latency,
        fitted_on=tuple(predictions.fingerprints(reference, range(min(REMEMBERED, len(predictions))))),
    )


def _reference(named: str | None, accuracy: Mapping[str, float], costs: Costs) -> str:
    """Return the reference model: the named one, or else the most accurate one, and of several the cheapest.

    Raises:
        CascadeError: the named model is not in the pool.
    """
    if named is None:
        return min(accuracy, key=lambda model: (-accuracy[model], costs.alone[model], model))
    if named not in accuracy:
        raise CascadeError(unknown_name_message("reference model", named, list(accuracy)))
    return named


def _cheapest(models: Iterable[str], costs: Costs, max_mean_cost: float | None) -> str:
    """Return the cheapest model.

    Raises:
        CascadeError: it costs more than the budget.
    """
    cheapest = min(models, key=lambda model: (costs.alone[model], model))
    if max_mean_cost is not None and max_mean_cost < costs.alone[cheapest]:
        raise CascadeError(
            f"max_mean_cost is {cost_text(max_mean_cost, costs.unit)} {costs.unit}, but the cheapest model, "
            f"'{cheapest}', takes {cost_text(costs.alone[cheapest], costs.unit)}. Raise the budget, or add a cheaper "
            "model."
        )
    return cheapest


def _operating_points(
    pool: Pool, lowest: OperatingPoint, target: float, max_mean_cost: float | None, slack: float, count: int
) -> tuple[OperatingPoint, list[OperatingPoint]]:
    """Build the operating point that is asked for, and others at evenly spaced targets.

    Args:
        pool: the candidates for stages.
        lowest: the cheapest model alone.
        target: relative accuracy of the point that is asked for, if there is no budget.
        max_mean_cost: the budget, or None. The most accurate point within it is the one that is asked for.
        slack: as in `fit`.
        count: number of other targets. With a budget, there are at least `SWEEP` of them.
    Returns:
        The point that is asked for, and the others.
    """

    def build(relative: float) -> OperatingPoint:
        return OperatingPoint(relative, tuple(pool.cascade(relative, slack)))

    targets = np.linspace(lowest.relative_accuracy, 1.0, count if max_mean_cost is None else max(count, SWEEP))
    others = [build(relative) for relative in targets.tolist() if relative > 0]
    if max_mean_cost is None:
        return build(target), others
    others.append(lowest)
    within = [point for point in others if point.mean_cost <= max_mean_cost]
    return max(within, key=lambda point: (point.accuracy, -point.mean_cost)), others


def candidates(predictions: Predictions, scores: Sequence[Score]) -> list[Candidate]:
    """Return each model with each rule. A rule that has parameters is fitted on the predictions."""
    found = []
    for model, logits in predictions.logits.items():
        temperature = fit_temperature(logits, predictions.labels)
        of_images = features(logits, temperature)
        rules: list[Rule | None] = [Rule(score, temperature) for score in FEATURES if score in scores]
        if "predictor" in scores:
            rules.append(fit_predictor(of_images, predictions.right(model), temperature))
        found += [
            Candidate(model, rule, np.ascontiguousarray(rule.of_features(of_images)))
            for rule in rules
            if rule is not None
        ]
    return found


def _relative(relative: float, absolute: float | None, reference: str, accuracy: Mapping[str, float]) -> float:
    """Return the target as a share of the reference's accuracy.

    A cascade that meets this relative target on the fitting data also meets the absolute one, because its right answers
    are the sum of the right answers of its stages.

    Raises:
        CascadeError: the reference is never right, or the target is out of range.
    """
    if accuracy[reference] == 0:
        raise CascadeError(f"The reference model '{reference}' is right on no image. Name another one.")
    if absolute is not None:
        if not 0 < absolute <= accuracy[reference]:
            raise CascadeError(
                f"min_accuracy is {absolute:g}, but the reference model '{reference}' reaches {accuracy[reference]:g}. "
                "Ask for a number above 0 and at most that."
            )
        return absolute / accuracy[reference]
    if not 0 < relative <= 1:
        raise CascadeError(f"min_relative_accuracy is {relative:g}, but allowed is above 0 and at most 1. Change it.")
    return relative


def _undominated(points: Sequence[OperatingPoint], asked: OperatingPoint) -> list[OperatingPoint]:
    """Return the points in the order of their cost, without those that are no more accurate than a cheaper point.

    The point that was asked for always stays.
    """
    kept: list[OperatingPoint] = []
    for point in sorted(points, key=lambda point: (point.mean_cost, -point.accuracy, point is not asked)):
        if point is asked or (all(point.accuracy > other.accuracy for other in kept) and point.stages != asked.stages):
            kept.append(point)
    return kept
