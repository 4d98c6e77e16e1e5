"""From predictions and costs to a cascade."""

from collections.abc import Sequence

import numpy as np

from multitask.cascade.cascade import Cascade, OperatingPoint
from multitask.cascade.costs import Costs
from multitask.cascade.errors import CascadeError
from multitask.cascade.greedy import Candidate, Pool
from multitask.cascade.predictions import Predictions
from multitask.cascade.rules import FEATURES, SCORES, Rule, Score, features, fit_predictor, fit_temperature
from patches.names import unknown_name_message

SWEEP = 33
"""Accuracy targets that a search for the best point within a budget tries."""
REMEMBERED = 32
"""Images whose fingerprints a cascade keeps, to know its fitting data again."""


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
    """Build the cheapest cascade that the greedy construction finds for an accuracy, or the best one for a cost.

    Accuracies and costs hold on the images given. On new ones thresholds fitted without slack fall a little short:
    fit on one part of the validation data, and measure on another (`fit_and_check`).

    Args:
        predictions: of a pool of models, on validation images.
        costs: of each model in the pool.
        min_relative_accuracy: accuracy over the reference's, above 0 and at most 1.
        min_accuracy: instead, a share of right answers (0 to 1) that the reference reaches.
        max_mean_cost: instead, a mean cost of an image: the most accurate cascade within it, of a sweep over targets.
        reference: the most accurate model by default, of equals the cheapest.
        slack: share of its answers (0.0025 is a quarter of a point) that each stage must be right on beyond the target.
        scores: the rules that stages may use.
        operating_points: how many targets, evenly down to the accuracy of the cheapest model, to build points for
            beside the one asked for; those that no other beats are kept for `Cascade.point(max_cost)`.
        latency: milliseconds of each model, for `Cascade.point(max_latency_ms)`.
    Raises:
        CascadeError: a target that no single model reaches, a budget below the cheapest model's cost, or costs or names
            that do not fit the predictions.
    Source: see `greedy`. We leave the paper in `slack`, in turning an absolute accuracy into a relative one, and in
        that a stage answers a hundredth of the images or more.
    """
    models = list(predictions.logits)
    for found in (costs, latency):
        if found is not None:
            found.check(models)
    right = {model: predictions.right(model) for model in models}
    accuracy = {model: float(right[model].mean()) for model in models}
    if reference is None:
        reference = min(models, key=lambda model: (-accuracy[model], costs.alone[model], model))
    elif reference not in models:
        raise CascadeError(unknown_name_message("reference model", reference, models))
    target = _relative(min_relative_accuracy, min_accuracy, reference, accuracy)
    cheapest = min(models, key=lambda model: (costs.alone[model], model))
    if max_mean_cost is not None and max_mean_cost < costs.alone[cheapest]:
        raise CascadeError(
            f"max_mean_cost is {max_mean_cost:g} {costs.unit}, but the cheapest model, '{cheapest}', takes "
            f"{costs.alone[cheapest]:g}. Raise the budget, or add a cheaper model."
        )
    pool = Pool(candidates(predictions, scores), right, costs, reference)

    def build(relative: float) -> OperatingPoint:
        return OperatingPoint(relative, tuple(pool.cascade(relative, slack)))

    lowest = min(1.0, accuracy[cheapest] / accuracy[reference])
    targets = max(operating_points, SWEEP if max_mean_cost is not None else 0)
    swept = [build(relative) for relative in np.linspace(lowest, 1.0, targets).tolist() if relative > 0]
    if max_mean_cost is not None:
        swept.append(OperatingPoint(lowest, (pool.alone(cheapest),)))
        within = [point for point in swept if point.mean_cost <= max_mean_cost]
        asked = max(within, key=lambda point: (point.accuracy, -point.mean_cost))
    else:
        asked = build(target)
    points = _undominated([asked, *swept], asked)
    return Cascade(
        points=tuple(points),
        asked=points.index(asked),
        reference=reference,
        costs=costs,
        slack=slack,
        latency=latency,
        fitted_on=tuple(predictions.fingerprints(reference, range(min(REMEMBERED, len(predictions))))),
    )


def candidates(predictions: Predictions, scores: Sequence[Score]) -> list[Candidate]:
    """Each model with each rule, fitted on the predictions where the rule needs it."""
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


def _relative(relative: float, absolute: float | None, reference: str, accuracy: dict[str, float]) -> float:
    """The target as a share of the reference's accuracy.

    On the fitting data an absolute target is met by the relative one, as the accuracies of the stages' answers add up.
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
        raise CascadeError(f"min_relative_accuracy is {relative:g}, but allowed is above 0 and at most 1.")
    return relative


def _undominated(points: Sequence[OperatingPoint], asked: OperatingPoint) -> list[OperatingPoint]:
    """By cost, without those that are no more accurate than a cheaper one; the one asked for stays in any case."""
    kept: list[OperatingPoint] = []
    for point in sorted(points, key=lambda point: (point.mean_cost, -point.accuracy, point is not asked)):
        if point is asked or (all(point.accuracy > other.accuracy for other in kept) and point.stages != asked.stages):
            kept.append(point)
    return kept
