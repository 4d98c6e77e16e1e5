import numpy as np
import pytest

from multitask.cascade.rules import FEATURES, SCORES, Rule, features, fit_predictor, fit_temperature

LOGITS = np.array([[2.0, 1.0, -1.0], [0.0, 0.0, 3.0], [0.1, 0.0, 0.05]])


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_scores_are_those_of_the_textbook_on_a_logarithmic_scale(temperature: float) -> None:
    found = features(LOGITS, temperature)

    p = softmax(LOGITS / temperature)
    top = p.max(axis=1)
    ordered = np.sort(LOGITS / temperature, axis=1)
    np.testing.assert_allclose(found[:, 0], np.log(top / (1 - top)))
    np.testing.assert_allclose(found[:, 1], ordered[:, -1] - ordered[:, -2])
    np.testing.assert_allclose(found[:, 2], -np.log(-(p * np.log(p)).sum(axis=1)))


def test_images_answered_with_certainty_still_differ() -> None:
    """In probabilities both would be 1 to the last bit."""
    sure = features(np.array([[60.0, 0.0, 0.0], [80.0, 0.0, 0.0], [5000.0, 0.0, 0.0]]))

    assert np.isfinite(sure).all()
    assert (np.diff(sure, axis=0) > 1).all()


def test_a_large_table_has_the_scores_of_its_parts() -> None:
    logits = np.random.default_rng(0).normal(size=(3000, 300)).astype(np.float32)

    assert np.array_equal(features(logits)[1234:1240], features(logits[1234:1240]))


def test_the_temperature_undoes_a_factor_on_calibrated_logits() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (20_000, 4))
    labels = (softmax(logits).cumsum(axis=1) > random.random((20_000, 1))).argmax(axis=1)

    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.05)
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, abs=0.15)
    assert fit_temperature(logits / 4, labels) == pytest.approx(1 / 4, abs=0.02)


def test_the_temperature_of_a_model_that_is_always_or_never_right_stays_within_its_bounds() -> None:
    logits = np.eye(3) * 5
    assert 0.05 <= fit_temperature(logits, np.arange(3)) < 0.5
    assert fit_temperature(logits, np.array([1, 2, 0])) == pytest.approx(20)


def test_the_predictors_score_is_the_log_odds_of_being_right() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (50_000, 3))
    of_images = features(logits)
    chance = 1 / (1 + np.exp(-(0.7 * of_images[:, 0] - 0.3)))
    rule = fit_predictor(of_images, random.random(50_000) < chance)

    assert rule is not None
    assert len(rule.weights) == len(FEATURES)
    predicted = 1 / (1 + np.exp(-rule.scores(logits)))
    assert np.abs(predicted - chance).mean() < 0.01


@pytest.mark.parametrize("value", [True, False])
def test_nothing_is_predicted_where_all_answers_are_alike(value: bool) -> None:
    assert fit_predictor(features(LOGITS), np.full(3, value)) is None


def test_a_threshold_is_told_in_the_words_of_its_rule() -> None:
    assert [Rule(score).threshold_text(0.0) for score in SCORES] == [
        "top probability ≥ 0.5000",
        "top-2 gap ≥ 0.000",
        "entropy ≤ 1.0000",
        "chance of being right ≥ 0.5000",
    ]
