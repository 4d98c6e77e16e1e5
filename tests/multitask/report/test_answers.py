"""Accuracy of each class, confusions and wrong answers, compared with counting one image after the other."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from multitask.report.answers import (
    Answers,
    class_accuracies,
    classes_without_images,
    confusion_matrix,
    confusions,
    surest_mistakes,
)

CLASSES = 5


def make_answers(pairs: list[tuple[int, int]], classes: int = CLASSES) -> Answers:
    """Answers for pairs of a right class and an answer, with probabilities that differ."""
    labels, answers = np.array(pairs, dtype=np.int64).T
    chances = np.random.default_rng(len(pairs)).permutation(len(pairs)) / len(pairs)
    names = tuple(f"class {label}" for label in range(classes))
    return Answers(
        classes=names,
        rows=10 + np.arange(len(pairs)),
        labels=labels,
        answers=answers,
        probabilities=chances.astype(np.float32),
    )


@given(st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1, max_size=60))
def test_everything_is_what_counting_finds(pairs: list[tuple[int, int]]) -> None:
    found = make_answers(pairs)
    images = Counter(label for label, _ in pairs)
    counts = Counter(pairs)

    accuracies = {one.name: one for one in class_accuracies(found)}
    assert accuracies.keys() == {f"class {label}" for label in images}
    for label, number in images.items():
        one = accuracies[f"class {label}"]
        assert (one.images, one.right) == (number, counts[label, label])
        worst = max((counts[label, answer] for answer in range(CLASSES) if answer != label), default=0)
        assert (one.confused.images if one.confused else 0) == worst
    shares = [one.share for one in class_accuracies(found)]
    assert shares == sorted(shares)

    told = {(one.label, one.answer): one for one in confusions(found)}
    assert {key: one.images for key, one in told.items()} == {
        (f"class {label}", f"class {answer}"): number for (label, answer), number in counts.items() if label != answer
    }
    assert all(one.share == one.images / images[int(one.label[6:])] for one in told.values())
    assert [one.images for one in confusions(found)] == sorted((one.images for one in told.values()), reverse=True)

    matrix = confusion_matrix(found)
    assert all(matrix[label, answer] == counts[label, answer] for label in range(CLASSES) for answer in range(CLASSES))
    assert classes_without_images(found) == [f"class {label}" for label in range(CLASSES) if label not in images]

    wrong = [place for place, (label, answer) in enumerate(pairs) if label != answer]
    surest = sorted(wrong, key=lambda place: -found.probabilities[place])
    assert surest_mistakes(found, 7).tolist() == surest[:7]


def test_many_classes_take_memory_for_the_confusions_that_occur_only() -> None:
    found = make_answers([(0, 99_999), (5, 5)], classes=100_000)

    assert [(one.label, one.answer, one.share) for one in confusions(found)] == [("class 0", "class 99999", 1.0)]
