"""Expansion of a job spec's entry with a list of resolutions into one task per resolution."""

from collections.abc import Mapping, Sequence
from typing import Any

from multitask.spec.errors import quoted

DEFAULT_METHOD = "scale_bias"
SHARED_HEAD = (DEFAULT_METHOD, "shared")
"""Patch methods that use the backbone's head, so that all resolutions share it."""


def expand(tasks: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """Replace each entry that has a list of resolutions by one task per resolution, named NAME@RESOLUTION.

    The entry's patch method says which tensors each resolution owns. The default `scale_bias` gives it scales, biases
    and running statistics; `shared` gives it nothing; `full` gives it everything.

    Args:
        tasks: the entries of the file, before validation. Values of the wrong shape are returned unchanged.
    Returns:
        The tasks, and for each task the index of its entry in `tasks`.
    Raises:
        ValueError: a list is empty or names a resolution twice, or an entry has `num_classes` although all its
            resolutions share the head. The message begins with the key.
    Source: Mudrakarta et al., "K for the Price of 1", ICLR 2019, arXiv:1810.10703, section 5.4.
    """
    groups = [_group(task, f"tasks[{index}]") for index, task in enumerate(tasks)]
    places = [index for index, group in enumerate(groups) for _ in group]
    return [task for group in groups for task in group], places


def _group(task: Any, key: str) -> list[Any]:
    if not isinstance(task, Mapping) or not isinstance(task.get("resolution"), list):
        return [task]
    task = {"method": DEFAULT_METHOD, **task}
    resolutions, method, classes = task["resolution"], task["method"], task.get("num_classes")
    if not resolutions or len(set(map(str, resolutions))) < len(resolutions):
        raise ValueError(
            f"{key}.resolution: expected one or more resolutions, each only once, found {quoted(resolutions)}"
        )
    if method in SHARED_HEAD and classes is not None:
        raise ValueError(
            f"{key}.num_classes: with method '{method}' all resolutions share the backbone's last layer, but "
            f"num_classes {quoted(classes)} asks for another one; set backbone.num_classes: {quoted(classes)} and no "
            "num_classes here (num_classes: null if task_defaults has it), or add '+last_layer' to the method for "
            "private last layers"
        )
    name = task.get("name")
    return [
        # The validation reports a name that is missing or is not a string.
        {**task, "resolution": resolution} | ({"name": f"{name}@{resolution}"} if isinstance(name, str) else {})
        for resolution in resolutions
    ]
