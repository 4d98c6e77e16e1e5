"""Pools of models that exist only as logits, and the dearest way to a cascade: trying all."""

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from multitask.cascade import Cascade, Costs, OperatingPoint, Predictions
from multitask.cascade.greedy import MIN_GAP, Candidate, Stage
from multitask.cascade.rules import Rule

POOL = {"small": (1.5, 10.0), "middle": (2.5, 25.0), "large": (5.0, 90.0)}
"""Model -> how well it sees, and its cost."""


def make_predictions(
    images: int = 400, classes: int = 5, seed: int = 0, pool: Mapping[str, float] | None = None
) -> Predictions:
    """Models that see the same images, hard ones and easy ones, through noise that is mostly the same."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, images)
    ease = np.where(random.random(images) < 0.7, 3.0, 0.6)[:, None] * random.uniform(0.5, 1.5, (images, 1))
    truth = np.eye(classes)[labels]
    sight = pool or {model: value for model, (value, _) in POOL.items()}
    noise = random.normal(0, 1, (images, classes))
    logits = {
        model: (strength * ease * truth + noise + random.normal(0, 0.3, (images, classes))).astype(np.float32)
        for model, strength in sight.items()
    }
    return Predictions(np.arange(images), labels, logits)


def costs_of_pool() -> Costs:
    return Costs("MACs", {model: cost for model, (_, cost) in POOL.items()})


def small_instance(
    random: np.random.Generator, images: int = 7, models: int = 3, rules: int = 2
) -> tuple[list[Candidate], dict[str, NDArray[np.bool_]], Costs, str]:
    """Candidates with random scores, some equal, random right answers and random costs; the reference is the best."""
    names = [f"model{number}" for number in range(models)]
    right = {name: random.random(images) < random.uniform(0.3, 1.0) for name in names}
    costs = Costs("MACs", {name: float(random.integers(1, 100)) for name in names})
    candidates = [
        Candidate(
            name,
            Rule("top_probability", temperature=1.0 + rule),
            random.integers(0, 6, images) / 10 + right[name] * 0.15,
        )
        for name in names
        for rule in range(rules)
    ]
    reference = min(names, key=lambda name: (-right[name].sum(), costs.alone[name], name))
    return candidates, right, costs, reference


def cost_of(stages: Sequence[Stage]) -> float:
    """Of all images together."""
    paid = answered = 0.0
    for stage in stages:
        paid += stage.cost
        answered += paid * stage.answered
    return answered


def exact_cost(
    candidates: Sequence[Candidate],
    right: Mapping[str, NDArray[np.bool_]],
    costs: Costs,
    reference: str,
    relative: float,
) -> float:
    """The smallest cost of all images together, over every cascade whose stages are each accurate enough.

    Dynamic programming over sets of remaining images and of models asked: every model, rule and threshold is tried in
    every state. A set is the bits of a number.
    """
    count = len(right[reference])

    def bits(places: NDArray[np.int64]) -> int:
        return sum(1 << int(place) for place in places)

    prefixes: list[tuple[str, int]] = []
    for candidate in candidates:
        for threshold in sorted(set(candidate.scores)):
            prefixes.append((candidate.model, bits(np.flatnonzero(candidate.scores >= threshold))))
    rights = {model: bits(np.flatnonzero(found)) for model, found in right.items()}

    @cache
    def best(remaining: int, asked: frozenset[str]) -> float:
        if not remaining:
            return 0.0
        images = remaining.bit_count()
        smallest = costs.after(reference, sorted(asked)) * images  # it may answer all that remain
        for model, prefix in prefixes:
            answered = remaining & prefix
            enough = (answered & rights[model]).bit_count() >= relative * (answered & rights[reference]).bit_count()
            if answered and enough:
                paid = costs.after(model, sorted(asked)) * images
                if paid < smallest:
                    smallest = min(smallest, paid + best(remaining & ~answered, asked | {model}))
        return smallest

    assert MIN_GAP < 0.05  # so that every distinct score of small_instance may be a threshold
    return best((1 << count) - 1, frozenset())


def made_cascade() -> Cascade:
    """A cascade with every kind of rule, without a fit."""
    costs = Costs("MACs", {"large": 90.0, "middle": 25.0, "small": 10.0}, {("middle", "small"): 5.0})
    predictor = Rule("predictor", 1.5, (0.5, 0.25, -0.5), 0.125)
    stages = (
        Stage("small", Rule("top_probability"), 2.5, 10.0, 200, 190),
        Stage("middle", predictor, -0.5, 20.0, 100, 90),
        Stage("large", Rule("top2_gap"), None, 90.0, 100, 80),
    )
    alone = (Stage("small", Rule("entropy", 0.5), None, 10.0, 400, 300),)
    points = (OperatingPoint(0.8, alone), OperatingPoint(1.0, stages))
    return Cascade(points, 1, "large", costs, 0.0025, latency=costs, fitted_on=("0123456789abcdef",))
