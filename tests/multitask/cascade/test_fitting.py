"""`fit`, operating points, and the honest protocol."""

from typing import Any

import numpy as np
import pytest

from multitask.cascade import CascadeError, Costs, Predictions, check, fit, fit_and_check
from multitask.cascade.cascade import answers_of
from multitask.cascade.checking import Interval
from multitask.cascade.rules import SCORES
from tests.multitask.cascade.pools import POOL, costs_of_pool, make_predictions

COSTS = costs_of_pool()


def test_the_default_is_as_accurate_as_the_best_model_and_cheaper() -> None:
    predictions = make_predictions(2000)
    cascade = fit(predictions, COSTS)
    point = cascade.point()

    assert cascade.reference == "large"
    assert point.accuracy >= predictions.right("large").mean()
    assert point.mean_cost < 0.7 * COSTS.alone["large"]
    assert point.worst_cost == sum({stage.model: COSTS.alone[stage.model] for stage in point.stages}.values())


@pytest.mark.parametrize("score", SCORES)
def test_what_the_fit_says_of_its_data_is_what_the_stages_do(score: Any) -> None:
    predictions = make_predictions(1500)
    point = fit(predictions, COSTS, scores=[score]).point()
    answers = answers_of(point, predictions)

    assert len(point.stages) > 1
    assert np.bincount(answers.stages, minlength=len(point.stages)).tolist() == [s.answered for s in point.stages]
    assert answers.costs.sum() / 1500 == point.mean_cost
    assert (answers.labels == predictions.labels).mean() == point.accuracy
    for number, stage in enumerate(point.stages):
        assert (answers.labels == predictions.labels)[answers.stages == number].sum() == stage.right


def test_an_absolute_accuracy_is_reached_on_the_fitting_data_for_less() -> None:
    predictions = make_predictions(2000)
    full, less = fit(predictions, COSTS).point(), fit(predictions, COSTS, min_accuracy=0.7).point()

    assert predictions.right("large").mean() > 0.75
    assert less.accuracy >= 0.7
    assert less.mean_cost < full.mean_cost


def test_a_budget_gives_the_most_accurate_cascade_within_it() -> None:
    predictions = make_predictions(2000)
    budgets = [10.0, 20.0, 40.0, 90.0]
    found = [fit(predictions, COSTS, max_mean_cost=budget).point() for budget in budgets]

    assert all(point.mean_cost <= budget for point, budget in zip(found, budgets, strict=True))
    assert [point.accuracy for point in found] == sorted(point.accuracy for point in found)
    assert found[0].accuracy < found[-1].accuracy
    assert [stage.model for stage in found[0].stages] == ["small"]
    assert found[-1].accuracy >= predictions.right("large").mean()


def test_operating_points_rise_in_cost_and_accuracy_and_a_budget_picks_among_them() -> None:
    predictions = make_predictions(2000)
    latency = Costs("ms", {model: cost / 100 for model, cost in COSTS.alone.items()})
    cascade = fit(predictions, COSTS, operating_points=8, latency=latency)

    costs, accuracies = zip(*((point.mean_cost, point.accuracy) for point in cascade.points), strict=True)
    assert len(costs) > 3
    assert (list(costs), list(accuracies)) == (sorted(costs), sorted(accuracies))
    middle = cascade.points[len(costs) // 2]
    assert cascade.point(max_cost=middle.mean_cost) is middle
    assert cascade.point(max_latency_ms=middle.mean_cost / 100 * (1 + 1e-9)) is middle
    assert cascade.point(max_cost=1e9, max_latency_ms=costs[0] / 100 * (1 + 1e-9)) is cascade.points[0]
    with pytest.raises(CascadeError, match="the cheapest takes"):
        cascade.point(max_cost=costs[0] / 2)
    with pytest.raises(CascadeError, match="knows no latency"):
        fit(predictions, COSTS).point(max_latency_ms=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_accuracy": 0.999}, "but the reference model 'large' reaches 0"),
        ({"min_relative_accuracy": 1.1}, "allowed is above 0 and at most 1"),
        ({"max_mean_cost": 9.0}, "the cheapest model, 'small', takes 10"),
        ({"reference": "larg"}, "Did you mean 'large'"),
        ({"latency": Costs("ms", {"small": 1})}, "Unknown model in the costs 'middle'"),
    ],
)
def test_what_cannot_be_fitted_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CascadeError, match=message):
        fit(make_predictions(100), COSTS, **options)


def test_a_model_without_a_right_answer_is_no_reference() -> None:
    predictions = Predictions(np.arange(3), np.array([1, 1, 1]), {"a": np.eye(2, dtype=np.float32)[[0, 0, 0]]})
    with pytest.raises(CascadeError, match="right on no image"):
        fit(predictions, Costs("MACs", {"a": 1}))


def test_one_model_alone_is_a_cascade() -> None:
    point = fit(make_predictions(100, pool={"large": 3.0}), COSTS).point()
    assert [(stage.model, stage.threshold) for stage in point.stages] == [("large", None)]


def test_the_check_is_on_the_half_that_was_not_fitted_on() -> None:
    predictions = make_predictions(4000)
    cascade, checked = fit_and_check(predictions, COSTS, seed=3)
    fitting, untouched = predictions.halves(3)
    answers = answers_of(cascade.point(), untouched)

    assert cascade == fit(fitting, COSTS)
    assert checked.images == 2000
    assert checked.accuracy.mean == pytest.approx((answers.labels == untouched.labels).mean())
    assert checked.mean_cost.mean == pytest.approx(answers.costs.mean())
    large = untouched.right("large")
    assert checked.accuracy_gain.mean == pytest.approx((answers.labels == untouched.labels).mean() - large.mean())
    assert checked.saving.mean == pytest.approx(1 - answers.costs.mean() / POOL["large"][1])
    assert sum(stage.share for stage in checked.stages) == pytest.approx(1)
    assert checked.equal.model == "large"
    assert [single.model for single in checked.singles] == ["small", "middle", "large"]
    for seen in (fitting, predictions):  # all of it, or among others
        with pytest.raises(CascadeError, match="thresholds were fitted on"):
            check(cascade, seen)


def test_slack_costs_something_and_holds_better_on_new_images() -> None:
    gains, costs = [], []
    for slack in (0.0, 0.02):
        found = [fit_and_check(make_predictions(3000, seed=seed), COSTS, slack=slack)[1] for seed in range(6)]
        gains.append(np.mean([one.accuracy_gain.mean for one in found]))
        costs.append(np.mean([one.mean_cost.mean for one in found]))

    assert gains[1] > gains[0]
    assert costs[1] > costs[0]


@pytest.mark.parametrize("images", [19, 500])
@pytest.mark.parametrize("share", [0.8, 0.97])
def test_intervals_hold_the_true_mean_19_times_in_20(images: int, share: float) -> None:
    random = np.random.default_rng(0)
    costs = np.array([1.0, 4.0])
    shares, means, gains = [], [], []
    for _ in range(400):
        hits = random.random(images) < share
        shares.append(Interval.of_share(hits))
        means.append(Interval.of_mean(costs[hits.astype(int)], 1.0, 4.0))
        gains.append(Interval.of_mean(hits.astype(int) - (random.random(images) < share), -1.0, 1.0))

    for found, truth in ((shares, share), (means, 1 + 3 * share), (gains, 0.0)):
        assert 0.92 < np.mean([one.low <= truth <= one.high for one in found]) <= 1.0
        assert all(one.low < one.high and one.low <= one.mean <= one.high for one in found)


def test_the_interval_of_a_share_is_wilsons() -> None:
    hits = np.arange(40) < 34
    found = Interval.of_share(hits)
    # Wilson's limits are the shares p that lie z standard errors, computed with p itself, from the share that was seen.
    for limit in (found.low, found.high):
        assert abs(0.85 - limit) == pytest.approx(1.96 * np.sqrt(limit * (1 - limit) / 40), rel=1e-9)
    assert found.low < found.mean < found.high


def test_the_interval_of_a_difference_is_bonetts_and_prices() -> None:
    only_one, only_other, count = 7, 3, 50
    values = np.array([1] * only_one + [-1] * only_other + [0] * (count - only_one - only_other))
    found = Interval.of_mean(values, -1, 1)
    one, other = (only_one + 1) / (count + 2), (only_other + 1) / (count + 2)
    margin = 1.96 * np.sqrt((one + other - (one - other) ** 2) / (count + 2))
    assert (found.mean, found.low, found.high) == pytest.approx((0.08, one - other - margin, one - other + margin))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_few_equal_images_give_no_interval_of_no_width(value: float) -> None:
    assert Interval.of_share(np.full(19, value == 1)).high - Interval.of_share(np.full(19, value == 1)).low > 0.15
    found = Interval.of_mean(np.full(19, value), 0.0, 1.0)
    assert found.high - found.low > 0.1
    assert (value == 0) == (found.low == 0.0 == found.mean)
    assert Interval.of_mean(np.full(19, 0.3), 0.3, 0.3).low == pytest.approx(0.3)  # no other value is possible


def test_the_reference_alone_differs_from_itself_by_nothing() -> None:
    found = fit_and_check(make_predictions(40), COSTS, slack=1.0)[1]
    assert [stage.model for stage in found.stages] == ["large"]
    for interval in (found.accuracy_gain, found.saving):
        assert (interval.mean, interval.low, interval.high) == (0.0, 0.0, 0.0)
