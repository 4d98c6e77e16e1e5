"""Training with balanced sampling, class weights, augmentation and mixed images: the same bits however it is run."""

from collections import Counter
from collections.abc import Callable
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multitask.data import write_table
from multitask.engines.local import DirectServer
from multitask.job.job import Job
from multitask.spec.errors import SpecError
from multitask.spec.reading import dump_spec, load_spec
from multitask.spec.schema import JobSpec
from multitask.worker import train_steps
from tests.conftest import CLASSES, png, run_engine, store_of

MakeSpec = Callable[..., JobSpec]
ROWS_OF = (14, 6, 3, 1)
"""Training images of each class."""
INPUTS: list[dict[str, Any]] = [
    {
        "augment": ["crop_flip", "color_jitter"],
        "mix": "cutmix",
        "sampling": "balanced",
        "class_weights": {"class 3": 2.0},
    },
    {"augment": ["flip", "rand_augment"], "mix": "mixup", "class_weights": "balanced", "accumulate": 2},
]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tables whose classes have 14, 6, 3 and 1 images."""
    folder = tmp_path_factory.mktemp("uneven")
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), ROWS_OF)).tolist()
    for split in ("train", "validation"):
        write_table(folder / split, ((png(row, label), label) for row, label in enumerate(labels)), CLASSES)
    return str(folder)


@pytest.fixture
def spec_of(make_spec: MakeSpec, uneven: str) -> Callable[..., JobSpec]:
    def spec(task: dict[str, Any], **changes: Any) -> JobSpec:
        changes = {"steps": 6, "evaluate_every": 6, "engine": {"name": "local", "schedule": "rounds"}, **changes}
        own = {"data": uneven, "shuffle_window": 7, "batch_size": 4, **task}
        return make_spec({"pets": {"workers": 2, **own}, "cars": {}}, **changes)

    return spec


def bits(groups: dict[str, Any]) -> dict[str, bytes]:
    return {name: group.values.tobytes() + group.counters.tobytes() for name, group in groups.items()}


@pytest.mark.parametrize("task", INPUTS)
def test_a_paused_run_goes_on_with_the_same_bits(spec_of: MakeSpec, task: dict[str, Any]) -> None:
    whole = run_engine(Job(spec_of(task)))
    job, asked = Job(spec_of(task)), count()
    first = run_engine(job, wants_pause=lambda: next(asked) >= 2)
    assert 0 < first.progress.workers["pets/0"].step < 6

    second = run_engine(Job(job.spec, store_of(job).latest()))

    assert bits(second.outcome.versions["last"].groups) == bits(whole.outcome.versions["last"].groups)
    losses = [(record.worker, record.step, record.loss) for record in first.records + second.records]
    assert losses == [(record.worker, record.step, record.loss) for record in whole.records]


@pytest.mark.parametrize("task", INPUTS)
def test_sync_has_the_bits_of_local_by_rounds(spec_of: MakeSpec, task: dict[str, Any]) -> None:
    """The server and the workers of `sync`, each worker with a stream of its own, in another order in each round."""
    local = run_engine(Job(spec_of(task)))
    job = Job(spec_of(task, engine={"name": "sync"}))
    server = job.make_server()
    workers = [job.make_worker(name, job.make_batches(name)) for name in job.workers]
    loops = [train_steps(worker, DirectServer(server), job.spec.steps, 0) for worker in workers]

    for turn in range(job.spec.steps + 1):
        for loop in loops[turn % 2 :] + loops[: turn % 2]:
            next(loop, None)

    expected = bits(local.outcome.versions["last"].groups)
    held = {name: group.state() for worker in workers for name, group in worker.private.items()}
    held |= {name: group.state() for name, group in server.shard.groups.items()}
    assert {name: bits(held)[name] for name in expected} == expected
    records, _, _ = server.drain()
    assert {(r.worker, r.step, r.loss) for r in records} == {(r.worker, r.step, r.loss) for r in local.records}


def test_resolutions_share_a_balanced_stream(spec_of: MakeSpec, uneven: str) -> None:
    task = {"data": uneven, "batch_size": 4, **INPUTS[0]}
    tasks = [{"name": f"pets@{size}", "method": "scale_bias", "resolution": size, **task} for size in (8, 12)]
    other = {**tasks[0], "name": "other", "sampling": "natural"}
    job = Job(load_spec({**dump_spec(spec_of({})), "tasks": [*tasks, other]}))

    assert job.sharing(job.workers) == [["pets@8/0", "pets@12/0"], ["other/0"]]
    stream = job.make_stream(["pets@8/0", "pets@12/0"])
    for name in ("pets@8/0", "pets@12/0"):
        alone = job.make_stream([name])
        for _ in range(3):
            found, expected = stream.next(name), alone.next(name)
            assert np.array_equal(found.rows, expected.rows)
            assert [pixels.tobytes() for pixels in found.pixels.values()] == [
                pixels.tobytes() for pixels in expected.pixels.values()
            ]


def test_balanced_sampling_gives_each_class_the_same_number_of_images(spec_of: MakeSpec) -> None:
    job = Job(spec_of({"sampling": "balanced", "workers": 1, "batch_size": 8}))
    batches = islice(job.make_batches("pets/0"), 3 * 24 // 8)
    assert Counter(label for batch in batches for label in batch.labels.tolist()) == dict.fromkeys(range(4), 18)


def test_stored_features_serve_a_balanced_stream(spec_of: MakeSpec, tmp_path: Path) -> None:
    task = {"method": "last_layer", "sampling": "balanced", "workers": 1}
    changes = {"train_shared": False, "steps": 14}
    cached = {**task, "cache_features": str(tmp_path)}
    plain, first, again = (run_engine(Job(spec_of(one, **changes))) for one in (task, cached, cached))

    losses = [(record.worker, record.step, record.loss) for record in plain.records]
    for ran in (first, again):
        assert [(record.worker, record.step, record.loss) for record in ran.records] == losses
    assert first.job.caches["pets"].missing_bytes() == 0


def test_balanced_weights_are_images_by_classes_by_images_of_the_class(spec_of: MakeSpec) -> None:
    job = Job(spec_of({"class_weights": "balanced"}))
    weights = job.class_weights["pets"]
    assert weights is not None
    assert weights.tolist() == pytest.approx([24 / (4 * rows) for rows in ROWS_OF])
    assert (weights * torch.tensor(ROWS_OF)).sum().item() == pytest.approx(24)
    assert job.class_weights["cars"] is None


def test_a_class_without_images_has_no_balanced_weight(spec_of: MakeSpec, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_table(tmp_path / split, ((png(row, row % 2), row % 2) for row in range(8)), CLASSES)
    for key in ("class_weights", "sampling"):
        job = Job(spec_of({"data": str(tmp_path), key: "balanced"}))
        labels = {label for batch in islice(job.make_batches("pets/0"), 4) for label in batch.labels.tolist()}
        assert labels == {0, 1}
        weights = job.class_weights["pets"]
        assert weights is None or weights.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_class_weights_enter_the_training_loss_and_not_the_evaluation(spec_of: MakeSpec) -> None:
    """At a rate near 0 all steps see the same network, so that only the loss differs."""
    still = {"optimizer": {"name": "sgd", "rate": 1e-30, "momentum": 0.0}}
    plain, weighted = (run_engine(Job(spec_of(task, **still))) for task in ({}, {"class_weights": {"class 0": 5.0}}))
    named = {r.worker: r.loss for r in weighted.records}

    assert weighted.job.class_weights["pets"].tolist() == [5.0, 1.0, 1.0, 1.0]
    assert [e.metrics for e in weighted.evaluations] == [e.metrics for e in plain.evaluations]
    other = {record.worker: record.loss for record in plain.records}
    assert named["cars/0"] == other["cars/0"]
    assert named["pets/0"] != other["pets/0"]


def test_a_class_weight_of_no_class_is_refused_with_both_lists(spec_of: MakeSpec) -> None:
    message = r"Task 'pets': class_weights has 'cat', but the classes are 'class 0', 'class 2', 'class 3', 'class 1'"
    with pytest.raises(SpecError, match=message):
        Job(spec_of({"class_weights": {"cat": 2.0, "class 1": 1.0}}))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"augment": "flap"}, r"tasks\[0\].augment: expected none, or one or several of crop_flip, .*, found 'flap'"),
        ({"augment": []}, r"augment: expected none, or one or several of"),
        ({"augment": 3}, r"augment: expected none, or one or several of .*, found 3"),
        ({"augment": ["none", "flip"]}, "found 'none' in it"),
        ({"augment": ["crop_flip", "flip"]}, "names a change twice; crop_flip stands for resize_crop and flip"),
        ({"mix": "mixed"}, r"mix: Input should be 'none', 'mixup' or 'cutmix'"),
        ({"mix_alpha": 0.2}, "mix_alpha is 0.2, but mix is 'none'"),
        ({"mix": "mixup", "mix_alpha": 0}, "mix_alpha: .*greater than 0"),
        ({"mix": "mixup", "batch_size": 1}, "batch_size is 1; set 2 or more"),
        ({"mix": "mixup", "cache_features": "cache"}, "needs mix 'none', but mix is 'mixup'"),
        ({"augment": ["flip"], "cache_features": "cache"}, "needs augment 'none', but augment is 'flip'"),
        ({"sampling": "fair"}, "sampling: Input should be 'natural' or 'balanced'"),
        ({"sampling": "balanced", "class_weights": "balanced"}, "both 'balanced'"),
        ({"class_weights": "even"}, "class_weights: expected none, balanced, or class names and their weights"),
        ({"class_weights": {}}, "class_weights: expected none, balanced, or"),
        ({"class_weights": {"cat": 0}}, "the weight of class 'cat' is 0; expected a number above 0"),
        ({"class_weights": {"cat": True}}, "the weight of class 'cat' is True"),
        ({"class_weights": {"cat": "much"}}, "the weight of class 'cat' is 'much'"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_read(
    spec_of: MakeSpec, task: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        spec_of(task, train_shared=False)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.filterwarnings("error")
def test_the_keys_survive_a_round_trip(spec_of: MakeSpec) -> None:
    for task in [*INPUTS, {"augment": ["flip"]}, {"augment": ["none"]}]:
        spec = spec_of(task)
        assert load_spec(dump_spec(spec)) == spec
    assert spec_of({"augment": ["flip"]}).tasks[0].augment == "flip"
    assert spec_of(INPUTS[0]).tasks[0].augment == ("crop_flip", "color_jitter")
