"""Plans of the feature caches of a job: which tasks have one, in which folder, under which key, and of which size."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multitask.data import ImageTable
from multitask.data.feature_cache import CachePlan
from multitask.job.tables import preprocessing
from multitask.spec.errors import SpecError
from multitask.spec.schema import JobSpec, TaskSpec
from patches import Backbone, PatchedModel
from patches.images.preprocessing import Preprocessing

GB = 1e9


def plan_caches(
    spec: JobSpec, backbone: Backbone, models: Mapping[str, PatchedModel], tables: Mapping[str, ImageTable]
) -> dict[str, CachePlan]:
    """Plan a feature cache for each task that asks for one.

    Args:
        backbone: the backbone with the weights that the job keeps frozen.
        models: task -> its model.
        tables: task -> its training table.
    Returns:
        Task -> the plan of its cache.
    Raises:
        SpecError: a task has no features that could be stored, or the disk has too little free space.
    """
    cached = [task for task in spec.tasks if task.cache_features is not None]
    if not cached:
        return {}
    content_hash = backbone.content_hash()
    plans = {}
    for task in cached:
        model = models[task.name]
        _check_model(task, model)
        shapes = model.shared_shapes(task.resolution)
        key = {
            "backbone": backbone.architecture() | {"content_hash": content_hash},
            "steps": {"read": list(model.reads), "kept": list(shapes)},
            "images": _images_key(preprocessing(task)),
            "table": tables[task.name].identity,
            # The last bits of the features depend on these values too: a kernel may add numbers in another order if
            # the batch size changes, and torch's attention uses another kernel in eval mode.
            "computation": {
                "eval": model.shared_in_eval,
                "batch_size": task.batch_size,
                "threads": spec.resources.threads_per_worker,
                "device": "cuda" if spec.resources.gpus_per_worker else "cpu",
            },
        }
        numbers = sum(math.prod(shape) for shape in shapes.values())
        folder = Path(str(task.cache_features)).expanduser().resolve()
        plans[task.name] = CachePlan(folder, json.loads(json.dumps(key)), tables[task.name].num_rows, 4 * numbers)
    _check_room(plans)
    return plans


def writers(plans: Mapping[str, CachePlan]) -> set[str]:
    """Return the tasks that write a cache.

    If several tasks share a cache only the first of them writes it, because all would write the same features.
    """
    first: dict[Path, str] = {}
    for task, plan in plans.items():
        first.setdefault(plan.path, task)
    return set(first.values())


def describe(plans: Mapping[str, CachePlan]) -> list[str]:
    """Return one line for each cache, which says how much disk space it takes."""
    lines = []
    for task in plans:
        if task in writers(plans):
            plan = plans[task]
            users = [other for other in plans if plans[other].path == plan.path]
            lines.append(
                f"Feature cache of {', '.join(users)}: {plan.total_bytes / GB:.3g} GB for {plan.num_rows:,} images "
                f"({plan.row_bytes:,} bytes each), of which {plan.missing_bytes() / GB:.3g} GB are still to be "
                f"written; {plan.free_bytes() / GB:.3g} GB are free in {plan.path}"
            )
    return lines


def _images_key(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return what the features depend on of the way that images become the network's input.

    `squash` is left out, and so is the interpolation, which are both as in version 0.1: with them no cache that exists
    would be found. "upright": version 0.1 stored features of images without their EXIF orientation.
    """
    content = preprocessing.as_json() | {"upright": True}
    del content["interpolation"]
    return content


def _check_model(task: TaskSpec, model: PatchedModel) -> None:
    where = f"Task '{task.name}': cache_features stores the outputs of the frozen steps of the backbone"
    if not model.reads:
        raise SpecError(
            f"{where}, but method '{task.method}' changes the first step already, so no frozen step comes before it. "
            "Leave cache_features out, or use a method that begins later (last_layer, dtl, mist, parasite)."
        )
    if model.backbone.auxiliary is not None:
        raise SpecError(
            f"{where}, but the auxiliary branch '{model.backbone.auxiliary}' reads a further output in training. "
            "Leave cache_features out, or set backbone.options.aux_logits: false."
        )
    if model.random_shared_layer is not None:
        raise SpecError(
            f"{where}, but '{model.random_shared_layer}' draws at random in training, so its outputs differ in every "
            "epoch. Leave cache_features out, or set that option of the backbone to 0."
        )


def _check_room(plans: Mapping[str, CachePlan]) -> None:
    for plan in plans.values():
        together = {other.path: other for other in plans.values() if other.disk() == plan.disk()}
        missing, free = sum(other.missing_bytes() for other in together.values()), plan.free_bytes()
        if missing > free:
            raise SpecError(
                f"'{plan.folder}': the feature caches on this disk have {missing / GB:.3g} GB still to be written, and "
                f"{free / GB:.3g} GB are free. Make room, name a folder on another disk in cache_features, or leave "
                "cache_features out."
            )
