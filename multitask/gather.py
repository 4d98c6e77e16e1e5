"""The server's side of MIST: a task's images as gathered maps, for an edge that never holds the backbone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from multitask.data import ImageTable
from multitask.job.models import load_backbone
from multitask.job.tables import open_split, table_batches
from multitask.spec.errors import SpecError
from multitask.spec.schema import JobSpec, TaskSpec
from patches.edge import MAPS
from patches.features import FeatureFile, Rows, write_features
from patches.methods.mist import Gather

Dtype = Literal["float32", "float16"]


def gather(
    spec: JobSpec, task: str, folder: Path, *, k: int | None = None, dtype: Dtype = "float32"
) -> dict[str, FeatureFile]:
    """Write the maps z_0 + ... + z_k of a task's training and validation images.

    The message of an image is its map: 605,184 bytes of ViT-B/16 at 224 px in float32, half of that in float16.

    Args:
        spec: gives the backbone and its weights; the task's method plays no part.
        folder: gets `train.arrow` and `validation.arrow`, each whole or not at all.
        k: last map of the sum, by default the backbone's last.
    Returns:
        Split -> its file.
    Raises:
        SpecError: no such task.
        PatchError: a backbone that is no ViT, or a k that it does not have.
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
        "preprocessing": {
            "resolution": found[0].resolution,
            "interpolation": "bilinear",
            "mean": list(found[0].mean),
            "std": list(found[0].std),
        },
    }
    written = {}
    for split in ("train", "validation"):
        table = open_split(found[0], split)
        path = folder / f"{split}.arrow"
        write_features(path, about | {"classes": list(table.classes)}, _maps(server, table, found[0], k, dtype))
        written[split] = FeatureFile(path)
    return written


def _maps(server: Gather, table: ImageTable, task: TaskSpec, k: int, dtype: Dtype) -> Iterator[Rows]:
    for batch in table_batches(table, task):
        maps = server(batch.images(), k).to(getattr(torch, dtype))
        assert batch.rows is not None
        yield Rows(batch.rows, batch.labels.numpy(), {MAPS: maps})
