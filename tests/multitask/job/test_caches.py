"""Training from stored features gives the same bits as training without them, and unsuitable jobs are refused."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from multitask.data import ImageTable, write_table
from multitask.data.loading import ImageLoader
from multitask.job import caches
from multitask.job.job import Job
from multitask.server.messages import as_tensor
from multitask.spec.errors import SpecError
from multitask.spec.schema import JobSpec
from patches import Backbone
from patches.backbone import load_backbone
from tests.conftest import EngineRun, png, run_engine

MakeSpec = Callable[..., JobSpec]
VIT = {"image_size": 8, "patch_size": 4, "num_layers": 3, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24}
SWIN = {"embed_dim": 8, "depths": [1, 1, 3, 1], "num_heads": [1, 2, 2, 4], "window_size": [2, 2]}
BACKBONES: dict[str, dict[str, Any]] = {
    "vit_b_16": {"name": "vit_b_16", "num_classes": 4, "options": VIT},
    "swin_b": {"name": "swin_b", "num_classes": 4, "options": {**SWIN, "stochastic_depth_prob": 0.2}},
    "resnet18": {"name": "resnet18", "num_classes": 4, "options": {}},
}
MOBILENET = None  # the fixture's own


def spec_of(
    make_spec: MakeSpec, folder: Path | None, method: str, network: str | None, task: dict[str, Any], **changes: Any
) -> JobSpec:
    """Return a spec with 24 images in batches of 8, so that an epoch has three steps."""
    own = {"method": method, **({} if folder is None else {"cache_features": str(folder)}), **task}
    changes = {"train_shared": False, "steps": 9, "evaluate_every": 9, **changes}
    changes |= {} if network is None else {"backbone": BACKBONES[network]}
    return make_spec({"pets": own}, **changes)


class Work(NamedTuple):
    """A run, and how much it computed and read."""

    ran: EngineRun
    losses: dict[str, list[float]]
    values: dict[str, Tensor]
    stems: int
    """Number of training batches that went through the first step of the frozen backbone."""
    decoded: int
    """Number of training images that were decoded."""


def run(job: Job) -> Work:
    counts: Counter[str] = Counter()
    first, load = Backbone.run, ImageLoader.load

    def counted_run(self: Backbone, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        counts["stems"] += start == 0 and stop == 1
        return first(self, x, start, stop)

    def counted_load(self: ImageLoader, rows: Any, resolutions: Any) -> Any:
        counts["decoded"] += len(rows) if "/train" in self.table.uri else 0
        return load(self, rows, resolutions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backbone, "run", counted_run)
        patch.setattr(ImageLoader, "load", counted_load)
        ran = run_engine(job)
    losses = {task: [r.loss for r in ran.records if r.task == task] for task in {r.task for r in ran.records}}
    values = {name: as_tensor(group.values) for name, group in ran.outcome.versions["last"].groups.items()}
    return Work(ran, losses, values, counts["stems"], counts["decoded"])


def assert_equal_bits(found: Work, expected: Work) -> None:
    assert len(set(next(iter(expected.losses.values())))) > 3
    assert found.losses == expected.losses
    assert found.ran.evaluations[-1].metrics == expected.ran.evaluations[-1].metrics
    assert found.values.keys() == expected.values.keys()
    for name, values in expected.values.items():
        assert torch.equal(found.values[name], values), name


@pytest.mark.parametrize(
    ("method", "backbone", "task", "decoded"),
    [
        ("last_layer", "vit_b_16", {}, 24),
        ("last_layer", MOBILENET, {}, 24),
        ("depthwise+last_layer", MOBILENET, {}, 24),
        ("last_layer", "resnet18", {"resolution": 16}, 24),
        ("dtl", "vit_b_16", {"options": {"first_block": 2}}, 24),
        ("mist", "vit_b_16", {"options": {"rank": 4}}, 24),
        ("parasite", "resnet18", {"resolution": 16, "options": {"ratio": 0.1}}, 72),
    ],
)
def test_losses_and_weights_have_the_bits_of_training_without_a_cache(
    make_spec: MakeSpec, tmp_path: Path, method: str, backbone: str | None, task: dict[str, Any], decoded: int
) -> None:
    """The second run finds all features in the cache. The parasite also reads the images."""
    plain = run(Job(spec_of(make_spec, None, method, backbone, task)))
    job = Job(spec_of(make_spec, tmp_path / "cache", method, backbone, task))
    first = run(job)
    again = run(Job(job.spec))

    assert plain.decoded == 72
    assert_equal_bits(first, plain)
    assert_equal_bits(again, plain)
    assert first.decoded == decoded
    assert again.decoded == (0 if decoded == 24 else 72)
    assert first.stems - again.stems == 3  # the batches of the first epoch
    plan = job.caches["pets"]
    assert plan.missing_bytes() == 0
    stored = sum(path.stat().st_size for path in plan.path.iterdir())
    assert stored >= plan.total_bytes


def test_mist_stores_the_sum_alone(make_spec: MakeSpec, tmp_path: Path) -> None:
    mist = Job(spec_of(make_spec, tmp_path, "mist", "vit_b_16", {}))
    dtl = Job(spec_of(make_spec, tmp_path, "dtl", "vit_b_16", {"options": {"first_block": 2}}))

    assert mist.caches["pets"].row_bytes == 4 * 5 * 16
    assert dtl.caches["pets"].row_bytes == 3 * 4 * 5 * 16


@pytest.mark.parametrize(
    ("engine", "workers"),
    [({"name": "local", "schedule": "rounds"}, 2), ({"name": "local", "delay": 1}, 1), ({"name": "local"}, 3)],
)
def test_several_workers_write_and_read_one_cache(
    make_spec: MakeSpec, tmp_path: Path, engine: dict[str, Any], workers: int
) -> None:
    task = {"workers": workers, "batch_size": 4, "accumulate": 2}
    plain = run(Job(spec_of(make_spec, None, "last_layer", "vit_b_16", task, engine=engine)))
    cached = run(Job(spec_of(make_spec, tmp_path / "cache", "last_layer", "vit_b_16", task, engine=engine)))

    assert_equal_bits(cached, plain)
    assert cached.decoded < plain.decoded / 2


def test_tasks_and_runs_share_a_cache_where_backbone_images_and_steps_are_equal(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    own = {"method": "last_layer", "cache_features": str(tmp_path / "cache")}
    changes = {"train_shared": False, "backbone": BACKBONES["vit_b_16"], "steps": 6, "evaluate_every": 6}
    tasks = {"pets": own, "pets_again": own, "pets_brighter": {**own, "mean": [0.1, 0.1, 0.1]}, "cars": own}
    job = Job(make_spec(tasks, **changes))
    plans = job.caches

    assert plans["pets"].path == plans["pets_again"].path
    assert len({plan.path for plan in plans.values()}) == 3
    assert caches.writers(plans) == {"pets", "pets_brighter", "cars"}
    assert [line.partition(":")[0] for line in caches.describe(plans)] == [
        "Feature cache of pets, pets_again",
        "Feature cache of pets_brighter",
        "Feature cache of cars",
    ]

    together = run(job)
    plain = {
        name: {key: value for key, value in task.items() if key != "cache_features"} for name, task in tasks.items()
    }
    assert_equal_bits(together, run(Job(make_spec(plain, **changes))))
    assert together.decoded == 3 * 24
    assert run(Job(make_spec({"pets": own}, **changes))).decoded == 0


@pytest.mark.parametrize(
    "change",
    [
        {"backbone": {**BACKBONES["vit_b_16"], "options": {**VIT, "num_heads": 4}}},
        {"seed": 1},
        {"task": {"method": "mist"}},
        {"task": {"std": [0.2, 0.2, 0.2]}},
        {"task": {"batch_size": 4}},
        {"resources": {"threads_per_worker": 2}},
    ],
)
def test_features_of_anything_else_are_not_taken(make_spec: MakeSpec, tmp_path: Path, change: dict[str, Any]) -> None:
    changes = {"backbone": BACKBONES["vit_b_16"], **change}
    task = changes.pop("task", {})
    first = Job(spec_of(make_spec, tmp_path, "last_layer", "vit_b_16", {})).caches["pets"]
    second = Job(spec_of(make_spec, tmp_path, task.pop("method", "last_layer"), None, task, **changes)).caches["pets"]

    assert second.path != first.path
    assert second.folder == first.folder


def test_a_killed_run_goes_on_with_what_is_there(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = spec_of(make_spec, tmp_path / "cache", "last_layer", "vit_b_16", {})
    plain = run(Job(spec_of(make_spec, None, "last_layer", "vit_b_16", {})))
    broken = run(Job(replace(spec, steps=2, evaluate_every=2)))
    assert broken.decoded == 16
    [path] = Job(spec).caches["pets"].path.iterdir()
    (path.parent / "torn.arrow").write_bytes(path.read_bytes()[:-100])

    after = run(Job(spec))

    assert_equal_bits(after, plain)
    assert after.decoded == 8


def test_images_that_cannot_be_decoded_are_skipped_and_counted_as_without_a_cache(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    for split in ("train", "validation"):
        content: Iterator[tuple[bytes, int]] = (
            (b"no image" if row in (3, 17) and split == "train" else png(row, row % 4), row % 4) for row in range(24)
        )
        write_table(folder / split, content, [f"class {label}" for label in range(4)])
    task = {"undecodable": "skip", "data": str(folder)}
    plain = run(Job(spec_of(make_spec, None, "last_layer", "vit_b_16", task)))
    cached = run(Job(spec_of(make_spec, tmp_path / "cache", "last_layer", "vit_b_16", task)))

    assert_equal_bits(cached, plain)
    assert sum(record.skipped for record in plain.ran.records) == 6
    for key in ("skipped", "bad_images", "images"):
        assert [getattr(r, key) for r in cached.ran.records] == [getattr(r, key) for r in plain.ran.records]
    assert cached.decoded < plain.decoded / 2


def test_a_stored_epoch_reads_nothing_of_the_table(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = spec_of(make_spec, tmp_path / "cache", "last_layer", "vit_b_16", {})
    run(Job(spec))
    job = Job(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageTable, "read_group", lambda *_: pytest.fail("a row group was fetched"))
        batch = next(job.make_batches("pets/0"))

    assert batch.pixels is None
    assert batch.features is not None


@pytest.mark.parametrize(
    ("method", "backbone", "task", "changes", "message"),
    [
        ("last_layer", "vit_b_16", {"augment": "crop_flip"}, {}, "needs augment 'none', but augment is 'crop_flip'"),
        ("last_layer", "vit_b_16", {"precision": "bfloat16"}, {}, "needs precision 'float32'"),
        ("last_layer", "vit_b_16", {"cache_features": "s3://bucket/cache"}, {}, "a folder on a local disk"),
        ("last_layer", "vit_b_16", {}, {"train_shared": True}, "train_shared is true"),
        ("scale_bias", MOBILENET, {}, {}, "changes the first step already"),
        ("last_layer", "swin_b", {"resolution": 32}, {}, "draws at random in training"),
    ],
)
def test_what_cannot_be_stored_is_refused(
    make_spec: MakeSpec,
    tmp_path: Path,
    method: str,
    backbone: str | None,
    task: dict[str, Any],
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(SpecError, match=message):
        Job(spec_of(make_spec, tmp_path, method, backbone, task, **changes))


def test_less_room_than_the_caches_take_is_refused(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(make_spec, tmp_path / "cache", "last_layer", "vit_b_16", {})
    total = Job(spec).caches["pets"].total_bytes
    usage = shutil.disk_usage(tmp_path)

    monkeypatch.setattr(shutil, "disk_usage", lambda _: type(usage)(usage.total, usage.used, total))
    Job(spec)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type(usage)(usage.total, usage.used, total - 1))
    with pytest.raises(SpecError, match="still to be written"):
        Job(spec)


def test_the_hash_of_the_backbone_is_that_of_its_values(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = spec_of(make_spec, tmp_path / "cache", "last_layer", "vit_b_16", {})
    backbone = load_backbone("vit_b_16", num_classes=4, seed=0, **VIT)
    before = Job(spec).caches["pets"]
    with torch.no_grad():
        backbone.network.get_parameter("class_token").add_(1e-3)
    backbone.save(tmp_path / "other.safetensors")

    other = Job(replace(spec, backbone=replace(spec.backbone, weights=str(tmp_path / "other.safetensors"))))

    # The names of version 0.1: under other ones no cache that exists would be found.
    assert before.key.keys() == {"backbone", "steps", "images", "table", "computation"}
    assert before.key["backbone"].keys() == {"name", "options", "content_hash"}
    assert before.key["steps"].keys() == {"read", "kept"}
    assert before.key["images"].keys() == {"resolution", "mean", "std", "upright"}
    assert before.key["computation"].keys() == {"eval", "batch_size", "threads", "device"}
    assert before.key["backbone"]["content_hash"] == load_backbone("vit_b_16", num_classes=4, **VIT).content_hash()
    assert other.caches["pets"].path != before.path


def test_each_way_to_resize_has_a_cache_of_its_own(make_spec: MakeSpec, tmp_path: Path) -> None:
    def path(**task: Any) -> Path:
        return Job(spec_of(make_spec, tmp_path / "cache", "last_layer", "vit_b_16", task)).caches["pets"].path

    assert path() == path(resize="squash")
    assert len({path(), path(resize="center_crop"), path(resize="pad"), path(resize="pad", mean=(0.1, 0.2, 0.3))}) == 4
