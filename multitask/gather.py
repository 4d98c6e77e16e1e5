"""The server's side of the method MIST: feature maps of a task's images, for an edge device without the backbone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from multitask.data import ImageTable
from multitask.job.models import load_backbone
from multitask.job.tables import open_split, preprocessing, table_batches
from multitask.spec.errors import SpecError
from multitask.spec.schema import JobSpec, TaskSpec
from patches.edge import MAPS
from patches.features import FeatureFile, Rows, write_features
from patches.methods.mist import Gather

Dtype = Literal["float32", "float16"]


def gather(
    spec: JobSpec, task: str, folder: Path, *, k: int | None = None, dtype: Dtype = "float32"
) -> dict[str, FeatureFile]:
    """Write the sums of maps z_0 + ... + z_k of a task's training and validation images.

    The edge device receives one map per image: 605,184 bytes for ViT-B/16 at 224 px in float32, and half of that in
    float16.

    Args:
        spec: names the backbone, its weights and the task's data; the task's patch method is not used.
        folder: receives `train.arrow` and `validation.arrow`; each file is complete or does not exist.
        k: index of the last map in the sum; by default the backbone's last map.
    Returns:
        Split -> its file.
    Raises:
        SpecError: the spec has no such task.
        DataError: a table cannot be read, or the validation table has a class that the training table lacks.
        PatchError: the backbone is not a ViT, or it has no map k.
    """
    found = [one for one in spec.tasks if one.name == task]
    if not found:
        raise SpecError(f"The spec has no task '{task}', only {[one.name for one in spec.tasks]}.")
    backbone = load_backbone(spec, spec.backbone.weights)
    k = backbone.num_blocks if k is None else k
    server = Gather(backbone)
    about: dict[str, Any] = {
        "backbone": backbone.identity(),
        "k": k,
        "preprocessing": preprocessing(found[0]).as_json(),
    }
    written = {}
    tables = {split: open_split(found[0], split) for split in ("train", "validation")}
    classes = tables["train"].classes
    tables = {split: table.in_classes(classes) for split, table in tables.items()}
    for split, table in tables.items():
        path = folder / f"{split}.arrow"
        write_features(path, about | {"classes": list(classes)}, _maps(server, table, found[0], k, dtype))
        written[split] = FeatureFile(path)
    return written


def _maps(server: Gather, table: ImageTable, task: TaskSpec, k: int, dtype: Dtype) -> Iterator[Rows]:
    """Yield the maps of a table's images, batch by batch."""
    for batch in table_batches(table, task):
        maps = server(batch.images(), k).to(getattr(torch, dtype))
        assert batch.rows is not None
        yield Rows(batch.rows, batch.labels.numpy(), {MAPS: maps})
