"""Rules that compute, from the logits of a model, a score of how sure the model is of its answer.

A high score means that the model is sure. A model answers if its score reaches a threshold, and abstains below it. All
scores are on a logarithmic scale, on which answers with a probability near 1 still differ.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Score = Literal["top_probability", "top2_gap", "entropy", "predictor"]
SCORES: tuple[Score, ...] = get_args(Score)
FEATURES: tuple[Score, ...] = SCORES[:3]
"""The scores that the predictor reads, in this order."""
CHUNK_VALUES = 1 << 18
"""Number of logits that are processed at once, so that they stay in the processor's cache."""
LARGEST_EXPONENT = 700.0
"""About the largest number whose exponential is a float."""
SMALLEST = 1e-300
"""Replaces a value of zero, which has no logarithm."""
TEMPERATURE_IMAGES = 10_000
"""Number of images that are enough to fit a temperature, which is a single number."""
TEMPERATURES = (0.05, 20.0)
"""Smallest and largest temperature."""
NEWTON_STEPS = 30
"""Largest number of steps of Newton's method."""


@dataclass(frozen=True)
class Rule:
    """A way to compute the score of a model's answers."""

    score: Score
    """Name of the score. top_probability: log-odds of the most probable class. top2_gap: difference of the two largest
    logits. entropy: minus the logarithm of the entropy (nats). predictor: log-odds that the answer is right, from a
    logistic regression on the other three scores."""
    temperature: float = 1.0
    """The logits are divided by this number before the score is computed."""
    weights: tuple[float, ...] = ()
    """Weights of the predictor, one for each of `FEATURES`."""
    bias: float = 0.0
    """Bias of the predictor."""

    def scores(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """Compute scores, shape (n,), from logits, shape (n, classes)."""
        return self.of_features(features(logits, self.temperature))

    def of_features(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute scores, shape (n,), from the result of the function `features`, shape (n, 3)."""
        if self.score == "predictor":
            return np.asarray(features @ np.array(self.weights) + self.bias)
        return features[:, FEATURES.index(self.score)]

    def threshold_text(self, threshold: float) -> str:
        """Describe a threshold in the unit of the score, for example as a probability."""
        threshold = max(threshold, -LARGEST_EXPONENT)  # below it, `exp` overflows
        if self.score in ("top_probability", "predictor"):
            name = "top probability" if self.score == "top_probability" else "chance of being right"
            return f"{name} ≥ {1 / (1 + math.exp(-threshold)):.4f}"
        return f"top-2 gap ≥ {threshold:.3f}" if self.score == "top2_gap" else f"entropy ≤ {math.exp(-threshold):.4f}"


def features(logits: NDArray[np.floating], temperature: float = 1.0) -> NDArray[np.float64]:
    """Compute the three scores that need no fitting, in the order of `FEATURES`.

    Args:
        logits: shape (n, classes), with two classes or more.
        temperature: number by which the logits are divided first.
    Returns:
        Shape (n, 3), float64.
    """
    found = np.empty((len(logits), len(FEATURES)))
    step = max(1, CHUNK_VALUES // logits.shape[1])
    for start in range(0, len(logits), step):
        found[start : start + step] = _features(logits[start : start + step].astype(np.float64) / temperature)
    return found


def _features(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the three scores of one chunk of logits."""
    top = logits.argmax(axis=1)[:, None]
    below = logits - np.take_along_axis(logits, top, axis=1)
    # The sums leave out the top class, because 1 - p would round to 0 for p near 1.
    np.put_along_axis(below, top, -np.inf, axis=1)
    gap = -below.max(axis=1)
    odds_against = np.exp(below)
    others = odds_against.sum(axis=1)
    np.put_along_axis(below, top, 0.0, axis=1)
    entropy = np.log1p(others) - (odds_against * below).sum(axis=1) / (1 + others)
    return np.stack([-np.log(np.maximum(others, SMALLEST)), gap, -np.log(np.maximum(entropy, SMALLEST))], axis=1)


def fit_temperature(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """Find the temperature at which the probabilities fit the labels best (smallest mean cross-entropy).

    This is Newton's method on the inverse temperature, in which the cross-entropy is convex. The result stays within
    `TEMPERATURES`, because a model that is always right has no best temperature.

    Args:
        logits: shape (n, classes).
        labels: shape (n,).
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599.
    """
    places = np.arange(min(len(labels), TEMPERATURE_IMAGES)) * len(labels) // min(len(labels), TEMPERATURE_IMAGES)
    chosen = logits[places].astype(np.float64)
    chosen -= chosen.max(axis=1, keepdims=True)
    of_label = chosen[np.arange(len(places)), labels[places]].mean()
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    inverse = 1.0
    for _ in range(NEWTON_STEPS):
        weights = np.exp(inverse * chosen)
        weights /= weights.sum(axis=1, keepdims=True)
        mean = (weights * chosen).sum(axis=1)
        slope = mean.mean() - of_label
        curvature = ((weights * chosen**2).sum(axis=1) - mean**2).mean()
        # A step at most halves or doubles the value, because the curvature is a poor guide far from the optimum.
        wanted = inverse - slope / max(curvature, SMALLEST)
        after = float(np.clip(wanted, max(low, inverse / 2), min(high, inverse * 2)))
        if abs(after - inverse) < 1e-9 * inverse:
            break
        inverse = after
    return 1 / inverse


def fit_predictor(features: NDArray[np.float64], right: NDArray[np.bool_], temperature: float = 1.0) -> Rule | None:
    """Fit the rule `predictor`: a logistic regression that predicts from the three scores whether an answer is right.

    Args:
        features: result of the function `features` for some temperature, shape (n, 3).
        right: whether each answer is right, shape (n,).
        temperature: that temperature.
    Returns:
        The rule with its coefficients. None if all answers are right or all are wrong, because nothing can be learned
        from them.
    """
    from sklearn.linear_model import LogisticRegression

    if right.all() or not right.any():
        return None
    mean, spread = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-12)
    fitted = LogisticRegression().fit((features - mean) / spread, right)
    weights = fitted.coef_[0] / spread
    return Rule("predictor", temperature, tuple(weights.tolist()), float(fitted.intercept_[0] - weights @ mean))
