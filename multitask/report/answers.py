"""What a model answered on labelled images: accuracy of each class, confusions, and the wrong answers."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers of one model on n labelled images, at least one."""

    classes: tuple[str, ...]
    """Name of each class."""
    rows: NDArray[np.int64]
    """Number of each image in its table, shape (n,)."""
    labels: NDArray[np.int64]
    """Right class of each image, shape (n,)."""
    answers: NDArray[np.int64]
    """Class that the model gave most probability, shape (n,)."""
    probabilities: NDArray[np.float32]
    """Probability of that class, 0 to 1, shape (n,)."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Images of one class that were taken for another one."""

    label: str
    """Name of the right class."""
    answer: str
    """Name of the class that the model answered."""
    images: int
    """Number of such images."""
    share: float
    """Their share of all images of the right class, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class ClassAccuracy:
    """Accuracy on the images of one class."""

    name: str
    right: int
    """Number of images with a right answer."""
    images: int
    """Number of images, at least one."""
    confused: Confusion | None
    """The most frequent wrong answer; None if all answers are right."""

    @property
    def share(self) -> float:
        """Share of the images with a right answer, 0 to 1."""
        return self.right / self.images


def class_accuracies(found: Answers) -> list[ClassAccuracy]:
    """Return the accuracy of each class that has images, worst first. Of equal ones, more images come first."""
    images = _images_of_class(found)
    right = np.bincount(found.labels[found.labels == found.answers], minlength=len(found.classes))
    most_frequent: dict[str, Confusion] = {}
    for confusion in confusions(found):
        most_frequent.setdefault(confusion.label, confusion)
    accuracies = [
        ClassAccuracy(name=name, right=int(right[label]), images=int(images[label]), confused=most_frequent.get(name))
        for label, name in enumerate(found.classes)
        if images[label]
    ]
    return sorted(accuracies, key=lambda one: (one.share, -one.images))


def classes_without_images(found: Answers) -> list[str]:
    """Return the names of the classes that no image has."""
    return [name for name, images in zip(found.classes, _images_of_class(found), strict=True) if not images]


def confusions(found: Answers) -> list[Confusion]:
    """Return all pairs of a right class and a wrong answer to it, those with the most images first.

    Of pairs with equally many images, the pair that is a larger share of its class comes first.
    """
    wrong = found.labels != found.answers
    # Only pairs that occur take memory: a full matrix of 20,000 classes would have 400 million numbers.
    pairs, counts = np.unique(np.stack([found.labels[wrong], found.answers[wrong]]), axis=1, return_counts=True)
    images = _images_of_class(found)
    unsorted = [
        Confusion(
            label=found.classes[label],
            answer=found.classes[answer],
            images=int(count),
            share=float(count / images[label]),
        )
        for (label, answer), count in zip(pairs.T, counts, strict=True)
    ]
    return sorted(unsorted, key=lambda one: (-one.images, -one.share))


def confusion_matrix(found: Answers) -> NDArray[np.int64]:
    """Return the number of images of each right class (rows) and each answer (columns), shape (classes, classes)."""
    classes = len(found.classes)
    return np.bincount(found.labels * classes + found.answers, minlength=classes**2).reshape(classes, classes)


def surest_mistakes(found: Answers, most: int) -> NDArray[np.int64]:
    """Return the positions of the wrong answers with the greatest probability, greatest first, at most `most`."""
    wrong = np.flatnonzero(found.labels != found.answers)
    return wrong[np.argsort(-found.probabilities[wrong], kind="stable")][:most]


def _images_of_class(found: Answers) -> NDArray[np.int64]:
    return np.bincount(found.labels, minlength=len(found.classes))
