"""Building a cascade stage by stage.

Source: Streeter, "Approximation Algorithms for Cascading Prediction Models", ICML 2018, arXiv:1802.07697.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from multitask.cascade.costs import Costs
from multitask.cascade.rules import Rule

MIN_GAP = 1e-4
"""Thresholds lie midway between observed scores at least this far apart: the last bits of a logit, which change with
the batch size, then send no image another way."""
MIN_SHARE = 0.01
"""A stage that answers fewer of all images is noise: it saves next to nothing, and seldom holds on new images."""
ROUNDING = 1e-7
"""Of a sum over a million images."""


@dataclass(frozen=True)
class Stage:
    """One model, and when it answers."""

    model: str
    rule: Rule
    threshold: float | None
    """It answers where the score is at least this; None: always."""
    cost: float
    """Of an image that reaches this stage, after the stages before it."""
    answered: int
    """Images of the fitting data that it answers."""
    right: int
    """Those of them that it answers rightly."""


@dataclass(frozen=True)
class Candidate:
    """A model with a rule, and what they say of the fitting data."""

    model: str
    rule: Rule
    scores: NDArray[np.float64]
    """Shape (n,)."""


class Pool:
    """Candidates for the stages of a cascade, sorted once for every cascade built from them."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        right: Mapping[str, NDArray[np.bool_]],
        costs: Costs,
        reference: str,
    ) -> None:
        """Args:
        candidates: at least one for each model.
        right: model -> shape (n,), whether its answers are right; the reference too.
        costs: of each model.
        reference: the model whose accuracy counts; it answers what nobody else does.
        """
        # The order decides between equals, so it must not be that of a dict or a folder.
        self._candidates = sorted(candidates, key=lambda one: (costs.alone[one.model], one.model))
        self._orders = [np.argsort(-one.scores) for one in self._candidates]
        self._right = right
        self._costs = costs
        self._reference = reference

    def cascade(self, relative_accuracy: float, slack: float) -> list[Stage]:
        """Stages that together are at least `relative_accuracy` times as accurate as the reference on the fitting data.

        As long as images remain, the greedy choice among all candidates and thresholds is the one that answers most
        images for its cost on all that remain, if it is accurate enough on those it answers. The reference may always
        answer all that remain, so that the result never costs more than the reference alone.

        Args:
            relative_accuracy: above 0; 1 is no loss.
            slack: a stage has to be right on this share of its answers more than asked, so that it holds on new data
                too; the reference as the last stage is not held to it.
        """
        reference = self._right[self._reference].astype(np.float64)
        # A stage is accurate enough where this sums to 0 or more over its answers.
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
        """The only stage of a cascade that asks one model."""
        rule = next(one.rule for one in self._candidates if one.model == model)
        right = self._right[model]
        return Stage(model, rule, None, self._costs.alone[model], len(right), int(right.sum()))

    def _best_stage(
        self, orders: list[NDArray[np.int64]], surplus: Mapping[str, NDArray[np.float64]], asked: list[str]
    ) -> tuple[Stage, NDArray[np.int64]]:
        """The best next stage, and the places of the images that it answers."""
        count = len(orders[0])
        fewest = MIN_SHARE * len(self._candidates[0].scores)
        found: tuple[Candidate, NDArray[np.int64], float | None] | None = None
        best = (0.0, 0)
        for candidate, order in zip(self._candidates, orders, strict=True):
            cost = self._costs.after(candidate.model, asked)
            if found is not None and _merit(count, count, cost) <= best:
                continue  # even if it answered all of them
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
    """The most answers that are accurate enough, the surest first.

    Args:
        scores: shape (n,), descending.
        surplus: shape (n,), of the same images: the answers up to a threshold are accurate enough where it sums to 0
            or more over them.
    Returns:
        Their number, and the threshold between them and the others: None where there are no others or no answers.
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
    """What the greedy choice maximises: answers for their cost, and among equals the number of answers."""
    return (answers / (images * cost) if cost > 0 else float("inf")), answers
