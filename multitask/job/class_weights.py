"""The weights of a task's classes in its training loss."""

import numpy as np
import torch
from torch import Tensor

from multitask.data import ImageTable
from multitask.data.classes import shown
from multitask.spec.errors import SpecError
from multitask.spec.schema import TaskSpec


def weigh_classes(task: TaskSpec, table: ImageTable) -> Tensor | None:
    """Return the weight of each class, or None if all classes count alike.

    `balanced` gives a class that has n of N images the weight N / (C n), where C is the number of classes that have
    images; a class without images gets 0. Of weights by name, classes that are not named get 1.

    Args:
        table: the task's training table, with labels that are positions in the model's class list.
    Returns:
        Shape (classes,), float32.
    Raises:
        SpecError: a name is not in the class list.
    Source: class_weight="balanced" of scikit-learn, which refuses a class without images.
    """
    given = task.class_weights
    if given == "none":
        return None
    if isinstance(given, str):
        rows_of = table.rows_of_class()
        balanced = table.num_rows / (np.count_nonzero(rows_of) * np.maximum(rows_of, 1))
        return torch.from_numpy(np.where(rows_of > 0, balanced, 0.0)).float()
    unknown = [name for name in given if name not in table.classes]
    if unknown:
        raise SpecError(
            f"Task '{task.name}': class_weights has {shown(unknown)}, but the classes are "
            f"{shown(table.classes, list(given))}. Write the names as `multitask data inspect` shows them."
        )
    return torch.tensor([given.get(name, 1.0) for name in table.classes])
