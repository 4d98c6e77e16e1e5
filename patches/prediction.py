"""Answers: what a model says about an image, as a person reads it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from patches.errors import ImageError


@dataclass(frozen=True, eq=False)
class Answer:
    """The answer of one task for one image."""

    task: str
    """Name of the task whose model answered."""
    class_name: str
    """Name of the class with the largest probability."""
    probability: float
    """Its probability."""
    probabilities: Tensor = field(repr=False)
    """Probability of each class, in the order of the task's classes: softmax of the logits, shape (classes,), float32,
    on the CPU."""
    logits: Tensor = field(repr=False)
    """Output of the network, shape (classes,), float32, on the CPU."""


def answers_of(tasks: Sequence[str], classes: Sequence[str], logits: Tensor) -> list[Answer]:
    """Return the answers that logits of shape (n, classes) stand for.

    Args:
        tasks: name of the task whose model computed the logits of each image, n names.
        classes: a name for each logit, in order.
    """
    logits = logits.float().cpu()
    found = []
    for task, own, probabilities in zip(tasks, logits, logits.softmax(dim=1), strict=True):
        best = int(own.argmax())
        found.append(Answer(task, classes[best], float(probabilities[best]), probabilities, own))
    return found


def answer_in_batches(
    images: Iterable[Tensor | ImageError], batch_size: int, answer: Callable[[list[Tensor]], Iterable[Answer]]
) -> Iterator[Answer | ImageError]:
    """Yield the answer to each image in order; in place of an image that could not be decoded, its error.

    Args:
        images: images as `answer` takes them, or errors.
        batch_size: number of images that `answer` gets at a time. Errors do not count.
        answer: returns an answer for each image of a batch.
    """
    group: list[Tensor | ImageError] = []
    waiting: list[Tensor] = []

    def answered() -> Iterator[Answer | ImageError]:
        found = iter(answer(waiting) if waiting else ())
        for image in group:
            yield image if isinstance(image, ImageError) else next(found)
        group.clear()
        waiting.clear()

    for image in images:
        group.append(image)
        if not isinstance(image, ImageError):
            waiting.append(image)
        if len(waiting) == batch_size:
            yield from answered()
    yield from answered()
