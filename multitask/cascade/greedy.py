"""The greedy construction of a cascade, stage by stage.

Source: Streeter, "Approximation Algorithms for Cascading Prediction Models", ICML 2018, arXiv:1802.07697.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from multitask.cascade.costs import Costs
from multitask.cascade.rules import Rule

MIN_GAP = 1e-4
"""Smallest distance between two observed scores with a threshold between them. The last bits of a logit change with the
batch size, and with this distance they never change which stage answers an image."""
MIN_SHARE = 0.01
"""Smallest share of all images that a stage answers. A smaller stage saves almost nothing, and its accuracy on new
images is uncertain."""
ROUNDING = 1e-7
"""Rounding error of a sum over a million images."""


@dataclass(frozen=True)
class Stage:
    """One model of a cascade, and the images that it answers."""

    model: str
    rule: Rule
    threshold: float | None
    """The stage answers an image if its score reaches this value. None means that it answers every image."""
    cost: float
    """Cost that this stage adds for an image that reaches it."""
    answered: int
    """Number of images of the fitting data that this stage answers."""
    right: int
    """Number of images of the fitting data that this stage answers rightly."""


@dataclass(frozen=True)
class Candidate:
    """A model with a rule, and its scores on the fitting data."""

    model: str
    rule: Rule
    scores: NDArray[np.float64]
    """Shape (n,)."""


class Pool:
    """Candidates for the stages of a cascade. They are sorted once; then several cascades can be built."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        right: Mapping[str, NDArray[np.bool_]],
        costs: Costs,
        reference: str,
    ) -> None:
        """Args:
        candidates: at least one for each model.
        right: model -> whether each of its answers is right, shape (n,). It includes the reference.
        costs: cost of each model.
        reference: the model that the accuracy is compared with. It answers the images that no other model answers.
        """
        # The first of several equal choices wins, so the order must not depend on a dict or a folder.
        self._candidates = sorted(candidates, key=lambda one: (costs.alone[one.model], one.model))
        self._orders = [np.argsort(-one.scores) for one in self._candidates]
        self._right = right
        self._costs = costs
        self._reference = reference

    def cascade(self, relative_accuracy: float, slack: float) -> list[Stage]:
        """Build a cascade that is at least `relative_accuracy` times as accurate as the reference on the fitting data.

        While images remain, the next stage is the best candidate and threshold among those that are accurate enough on
        the images they answer. The best one has the largest number of answers, divided by the cost of asking it about
        all remaining images. The reference may always answer all remaining images, so the cascade never costs more than
        the reference alone.

        Args:
            relative_accuracy: above 0. The value 1 means that no accuracy is lost.
            slack: share of its answers on which a stage must be right beyond this target, so that it also reaches the
                target on new data. It does not apply to the reference as the last stage.
        """
        reference = self._right[self._reference].astype(np.float64)
        # A stage is accurate enough if the sum of this surplus over its answers is 0 or more.
        surplus = {model: right - relative_accuracy * reference - slack for model, right in self._right.items()}
        remaining = np.ones(len(reference), dtype=np.bool_)
        orders = list(self._orders)
        stages: list[Stage] = []
        while remaining.any():
            stage, answered = self._best_stage(orders, surplus, [stage.model for stage in stages])
            stages.append(stage)
            remaining[answered] = False
            orders = [order[remaining[order]] for order in orders]
        return stages

    def alone(self, model: str) -> Stage:
        """Return the only stage of a cascade that consists of one model."""
        rule = next(one.rule for one in self._candidates if one.model == model)
        right = self._right[model]
        return Stage(model, rule, None, self._costs.alone[model], len(right), int(right.sum()))

    def _best_stage(
        self, orders: list[NDArray[np.int64]], surplus: Mapping[str, NDArray[np.float64]], asked: list[str]
    ) -> tuple[Stage, NDArray[np.int64]]:
        """Return the best next stage, and the positions of the images that it answers."""
        count = len(orders[0])
        fewest = MIN_SHARE * len(self._candidates[0].scores)
        found: tuple[Candidate, NDArray[np.int64], float | None] | None = None
        best = (0.0, 0)
        for candidate, order in zip(self._candidates, orders, strict=True):
            cost = self._costs.after(candidate.model, asked)
            if found is not None and _merit(count, count, cost) <= best:
                continue  # it would be no better even if it answered all remaining images
            answers, threshold = longest_prefix(candidate.scores[order], surplus[candidate.model][order])
            if answers < min(count, fewest):
                answers = 0
            if answers < count and candidate.model == self._reference:
                everything = _merit(count, count, cost)
                if everything >= _merit(answers, count, cost):
                    answers, threshold = count, None
            if answers and (found is None or _merit(answers, count, cost) > best):
                found, best = (candidate, order[:answers], threshold), _merit(answers, count, cost)
        assert found is not None, "the reference is always feasible"
        candidate, answered, threshold = found
        rights = int(self._right[candidate.model][answered].sum())
        cost = self._costs.after(candidate.model, asked)
        return Stage(candidate.model, candidate.rule, threshold, cost, len(answered), rights), answered


def longest_prefix(scores: NDArray[np.float64], surplus: NDArray[np.float64]) -> tuple[int, float | None]:
    """Find the lowest threshold at which the answers are still accurate enough.

    Args:
        scores: scores of the images in descending order, shape (n,).
        surplus: for each image 1 if the answer is right and 0 if it is wrong, less the share of right answers that is
            asked for; shape (n,). The answers above a threshold are accurate enough if their surplus sums to 0 or more.
    Returns:
        The number of answers, and the threshold. It is None if all images are answered, or none.
    """
    total = np.cumsum(surplus)
    if total[-1] >= -ROUNDING:
        return len(scores), None
    cuts = np.flatnonzero((total[:-1] >= -ROUNDING) & (scores[:-1] - scores[1:] >= MIN_GAP))
    if not len(cuts):
        return 0, None
    last = int(cuts[-1])
    return last + 1, float((scores[last] + scores[last + 1]) / 2)


def _merit(answers: int, images: int, cost: float) -> tuple[float, int]:
    """Return the value that the greedy choice maximises: answers per cost and, between equals, number of answers."""
    return (answers / (images * cost) if cost > 0 else float("inf")), answers
