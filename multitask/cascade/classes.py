"""The classes of a pool of models, which are matched by name."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from multitask.cascade.errors import CascadeError
from multitask.data.classes import positions, shown


def common_classes(
    classes: Mapping[str, Sequence[str] | None],
) -> tuple[tuple[str, ...] | None, dict[str, NDArray[np.int64]]]:
    """Return the class list of a pool, and what brings the logits of its models into the order of that list.

    Args:
        classes: model -> its class list, or None if it is unknown. Such a model must have the order of the others.
    Returns:
        The class list of the first model that has one, or None; and model -> the columns of its logits, shape
        (classes,), in the order of that list, for the models that have another order.
    Raises:
        CascadeError: two models have different classes.
    """
    known = {model: tuple(names) for model, names in classes.items() if names is not None}
    if not known:
        return None, {}
    first, common = next(iter(known.items()))
    columns = {}
    for model, names in known.items():
        if sorted(names) != sorted(common):
            raise CascadeError(
                f"Models '{first}' and '{model}' have different classes: {shown(common, names)}, and "
                f"{shown(names, common)}. The models of a cascade answer the same question. Leave one of them out, or "
                "train it on the same classes."
            )
        if names != common:
            columns[model] = positions(common, names, f"Model '{model}'")
    return common, columns
