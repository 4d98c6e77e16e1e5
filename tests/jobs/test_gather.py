"""`multitask gather`: a task's images become the feature maps that MIST's edge learns from."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from multitask.gather import gather
from multitask.job.models import load_backbone
from multitask.job.tables import open_split, table_batches
from multitask.run.directory import write_spec
from multitask.spec.schema import JobSpec
from patches.features import FeatureFile
from patches.methods.mist import Gather
from tests.conftest import CLASSES, write_named
from tests.jobs.command import multitask

MakeSpec = Callable[..., JobSpec]
VIT = {
    "name": "vit_b_16",
    "num_classes": 4,
    "options": {"image_size": 8, "patch_size": 4, "num_layers": 3, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16},
}
TASK = {"pets": {"method": "mist"}}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_maps_are_the_backbones_sums_in_the_tables_order(make_spec: MakeSpec, tmp_path: Path, dtype: str) -> None:
    spec = make_spec(TASK, backbone=VIT, train_shared=False)
    write_spec(tmp_path / "spec.yaml", spec)

    done = multitask("gather", tmp_path / "spec.yaml", "pets", tmp_path / "maps", "--k", 2, "--dtype", dtype)

    assert done.returncode == 0, done.stderr
    backbone = load_backbone(spec, None)
    for split in ("train", "validation"):
        maps = FeatureFile(tmp_path / "maps" / f"{split}.arrow")
        batches = list(table_batches(open_split(spec.tasks[0], split), spec.tasks[0]))
        expected = torch.cat([Gather(backbone)(batch.images(), 2) for batch in batches]).to(getattr(torch, dtype))
        found = maps.layouts["maps"].empty(len(maps))
        maps.read("maps", torch.arange(len(maps)).numpy(), found, range(len(maps)))
        assert torch.equal(found, expected)
        assert maps.labels.tolist() == torch.cat([batch.labels for batch in batches]).tolist()
        assert maps.about["k"] == 2
        row_bytes = 5 * 8 * found.element_size()
        assert f"{split}: {len(maps)} images of {row_bytes} bytes each" in done.stdout


def test_labels_of_both_files_are_positions_in_the_training_tables_classes(make_spec: MakeSpec, tmp_path: Path) -> None:
    write_named(tmp_path / "data" / "train", CLASSES)
    write_named(tmp_path / "data" / "validation", CLASSES[::-1])
    spec = make_spec({"pets": {**TASK["pets"], "data": str(tmp_path / "data")}}, backbone=VIT, train_shared=False)

    files = gather(spec, "pets", tmp_path / "maps")

    assert files["train"].labels.tolist() == files["validation"].labels.tolist()
    assert files["validation"].about["classes"] == CLASSES


def test_a_task_that_is_not_there_is_refused(make_spec: MakeSpec, tmp_path: Path) -> None:
    write_spec(tmp_path / "spec.yaml", make_spec(TASK, backbone=VIT, train_shared=False))

    done = multitask("gather", tmp_path / "spec.yaml", "cars", tmp_path / "maps")

    assert done.returncode != 0
    assert "The spec has no task 'cars', only ['pets']." in done.stderr
    assert not (tmp_path / "maps").exists()
