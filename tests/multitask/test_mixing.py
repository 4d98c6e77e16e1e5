"""Mixed images, and the loss of weighted classes and mixed labels, against formulas written here in float64."""

import pytest
import torch
from torch import Tensor

from multitask.worker import make_mix, task_loss

CLASSES = 5
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0], dtype=torch.float64)
SMOOTHING = 0.1


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Images (6, 3, 8, 8), labels (6,) and logits (6, CLASSES)."""
    labels = torch.tensor([0, 3, 1, 4, 4, 2])
    return torch.rand(6, 3, 8, 8).double(), labels, torch.randn(6, CLASSES).double()


def weighted_mean(logits: Tensor, labels: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """sum_i w_i l_i / sum_i w_i, with torch's smoothing, whose spread part has the weights of all classes."""
    minus_log = -(logits - logits.logsumexp(1, keepdim=True))
    own = weights[labels] * minus_log[torch.arange(len(labels)), labels]
    spread = (weights * minus_log).mean(1)
    return ((1 - smoothing) * own + smoothing * spread).sum() / weights[labels].sum()


def shares_of(mixed_labels: Tensor, labels: Tensor) -> float:
    """The share lambda that the first image kept of its label."""
    assert labels[0] != labels[-1]
    return mixed_labels[0, labels[0]].item()


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, SMOOTHING])
def test_a_loss_with_class_weights_is_the_weighted_mean(weights: Tensor | None, smoothing: float) -> None:
    _, labels, logits = drawn()
    expected = weighted_mean(logits, labels, torch.ones(CLASSES).double() if weights is None else weights, smoothing)

    options = {"label_smoothing": smoothing, "class_weights": weights}
    found = task_loss(logits, labels, auxiliary_weight=0.0, **options)
    with_auxiliary = task_loss((logits, 2 * logits), labels, auxiliary_weight=0.4, **options)

    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    second = task_loss(2 * logits, labels, auxiliary_weight=0.0, **options)
    torch.testing.assert_close(with_auxiliary, expected + 0.4 * second, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, SMOOTHING])
def test_the_loss_of_mixed_images_is_the_mean_of_both_labels_losses(
    kind: str, weights: Tensor | None, smoothing: float
) -> None:
    images, labels, logits = drawn()
    mix = make_mix(kind, 1.0, CLASSES)
    assert mix is not None

    _, mixed = mix(images, labels)
    found = task_loss(logits, mixed.double(), label_smoothing=smoothing, auxiliary_weight=0.0, class_weights=weights)

    share = mixed.double()[0, labels[0]]
    assert 0 < share < 1
    used = torch.ones(CLASSES).double() if weights is None else weights
    own, other = (weighted_mean(logits, of, used, smoothing) for of in (labels, labels.roll(1)))
    # The shares are float32, as the images that training mixes.
    torch.testing.assert_close(found, share * own + (1 - share) * other, rtol=1e-6, atol=0)


def test_mixup_adds_each_image_to_the_one_before_it() -> None:
    images, labels, _ = drawn()
    mix = make_mix("mixup", 1.0, CLASSES)
    assert mix is not None

    mixed, shares = mix(images, labels)

    share = shares_of(shares.double(), labels)
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0), rtol=1e-6, atol=1e-6)


def test_cutmix_replaces_a_box_and_the_labels_have_the_shares_of_the_area() -> None:
    images, labels, _ = drawn()
    mix = make_mix("cutmix", 1.0, CLASSES)
    assert mix is not None
    shares = set()
    for _ in range(20):
        mixed, labels_of = mix(images, labels)
        kept = (mixed == images).all(1)
        assert torch.equal(mixed, torch.where(kept[:, None], images, images.roll(1, 0)))
        for mask in kept:
            rows, columns = (~mask).any(1).nonzero(), (~mask).any(0).nonzero()
            assert (~mask).sum() == len(rows) * len(columns), "what is replaced is a box"
        shares.add(shares_of(labels_of, labels))
        assert shares_of(labels_of, labels) == pytest.approx(kept[0].float().mean().item(), abs=1e-6)
    assert len(shares) > 5


@pytest.mark.parametrize(("kind", "alpha", "expected"), [("mixup", None, 0.2), ("mixup", 2.0, 2.0)])
def test_the_share_follows_the_beta_distribution(kind: str, alpha: float | None, expected: float) -> None:
    images, labels, _ = drawn()
    mix = make_mix(kind, alpha, CLASSES)
    assert mix is not None

    found = torch.tensor([shares_of(mix(images[:, :, :1, :1], labels)[1], labels) for _ in range(1500)])

    # Beta(a, a) has the mean 1/2 and the variance 1 / (4 (2 a + 1)).
    assert found.mean().item() == pytest.approx(0.5, abs=0.05)
    assert found.var().item() == pytest.approx(1 / (4 * (2 * expected + 1)), rel=0.1)


def test_bfloat16_logits_have_a_float32_loss() -> None:
    images, labels, logits = drawn()
    mix = make_mix("mixup", None, CLASSES)
    assert mix is not None
    _, mixed = mix(images, labels)

    def loss(scores: Tensor) -> Tensor:
        options = {"label_smoothing": SMOOTHING, "class_weights": WEIGHTS.float()}
        return task_loss(scores, mixed, auxiliary_weight=0.0, **options)

    with torch.autocast("cpu", torch.bfloat16):
        found = loss(logits.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(logits.bfloat16().float()), rtol=1e-6, atol=0)


def test_nothing_is_mixed_by_default() -> None:
    assert make_mix("none", None, CLASSES) is None
