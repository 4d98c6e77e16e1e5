"""One data set at several resolutions: an entry of a job spec that stands for as many tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

DEFAULT_METHOD = "scale_bias"
SHARED_HEAD = (DEFAULT_METHOD, "shared")
"""Methods that leave the head to the backbone, so that all resolutions share it."""


def expand(tasks: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """A job spec's tasks, those with a list of resolutions as one task of each, named NAME@RESOLUTION.

    The method says what each resolution owns: `scale_bias`, the default, its scales, biases and running statistics;
    `shared` nothing; `full` everything.

    Args:
        tasks: as the file has them, before validation; what has the wrong shape comes back as it is.
    Returns:
        The tasks, and for each the index of its entry in `tasks`.
    Raises:
        ValueError: a list that names no resolution, or one twice, or `num_classes` beside a head that all share; the
            message begins with the key.
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
    if not resolutions or any(resolutions.count(resolution) > 1 for resolution in resolutions):
        raise ValueError(f"{key}.resolution: a list names one resolution or more, each once, found {resolutions}")
    if method in SHARED_HEAD and classes is not None:
        raise ValueError(
            f"{key}.num_classes: with method '{method}' all resolutions share the backbone's last layer, but "
            f"num_classes {classes} asks for another; set backbone.num_classes: {classes} and no num_classes here "
            "(num_classes: null where task_defaults has it), or join '+last_layer' to the method for private ones"
        )
    name = task.get("name")
    return [
        # A name that is no text, or missing, is left for the validation to find.
        {**task, "resolution": resolution} | ({"name": f"{name}@{resolution}"} if isinstance(name, str) else {})
        for resolution in resolutions
    ]
