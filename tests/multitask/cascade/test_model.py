"""The package and the cascade at run time, on small networks with real patches."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

import patches
from multitask.cascade import (
    Cascade,
    CascadeError,
    CascadeModel,
    Costs,
    Predictions,
    fit,
    load_cascade,
    save_cascade,
    save_package,
)
from multitask.cascade.artifact import open_package
from multitask.cascade.greedy import MIN_GAP
from multitask.cascade.model import pixels
from multitask.cascade.rules import features
from patches import PatchedModel, Preprocessing
from tests.patches.helpers import randomised, small_backbone

IMAGES = 150
SIZES = {"r8": 8, "r12": 12, "r16": 16, "other16": 16, "last16": 16}
COSTS = Costs("MACs", {"r8": 1, "r12": 5, "r16": 100, "other16": 101, "last16": 102})


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    """Pixels of several sizes, in patches of random colours."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(IMAGES, 3, 3, 3, generator=random) ** torch.rand(IMAGES, 1, 1, 1, generator=random).mul(3)
    return [
        (255 * interpolate(colours[None], (18 + number % 5, 20))[0]).to(torch.uint8)
        for number, colours in enumerate(coarse)
    ]


def learn(model: PatchedModel, x: Tensor, reverse: bool) -> None:
    """Tell dark images from bright ones, in five classes."""
    labels = (x.mean(dim=(1, 2, 3)).argsort(descending=reverse).argsort() * 5) // len(x)
    optimizer = torch.optim.Adam([tensor for tensor in model.parameters() if tensor.requires_grad], lr=0.03)
    model.train()
    for _ in range(25):
        optimizer.zero_grad()
        cross_entropy(model(x), labels).backward()
        optimizer.step()
    model.eval()


@pytest.fixture(scope="module")
def models(images: list[Tensor], views: dict[str, Preprocessing]) -> dict[str, PatchedModel]:
    """Three resolutions with norms of their own, and two heads at 16 px that share all steps before them."""
    torch.set_num_threads(1)  # `one_thread` comes after the fixtures of a module
    backbone = small_backbone(dropout=0.0, norm_momentum=0.5)
    backbone.network.train()
    with torch.no_grad():  # statistics of these images: else every image looks the same to it
        for _ in range(10):
            backbone.network(pixels(images, views["r16"], torch.device("cpu")))
    backbone.network.eval()
    found = {}
    for number, (name, view) in enumerate(views.items()):
        method = "scale_bias+last_layer" if name.startswith("r") else "last_layer"
        found[name] = patches.attach(backbone, method, 5, seed=number)
        learn(found[name], pixels(images, view, torch.device("cpu")), reverse=name == "other16")
    return found


@pytest.fixture(scope="module")
def views() -> dict[str, Preprocessing]:
    return {name: Preprocessing(size, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)) for name, size in SIZES.items()}


def sure_third(logits: NDArray[np.float32]) -> NDArray[np.bool_]:
    gap = features(logits)[:, 1]
    return gap > np.quantile(gap, 2 / 3)


@pytest.fixture(scope="module")
def predictions(images: list[Tensor], models: dict[str, PatchedModel], views: dict[str, Preprocessing]) -> Predictions:
    """Logits as evaluation computes them; labels that the smaller models know where they are sure."""
    with torch.no_grad():
        logits = {
            name: model(pixels(images, views[name], torch.device("cpu"))).numpy() for name, model in models.items()
        }
    labels = logits["r16"].argmax(axis=1)
    for name in ("r12", "r8"):
        labels = np.where(sure_third(logits[name]), logits[name].argmax(axis=1), labels)
    return Predictions(np.arange(IMAGES), labels, logits)


@pytest.fixture(scope="module")
def cascade(predictions: Predictions) -> Cascade:
    return fit(predictions, COSTS, reference="r16", operating_points=6)


@pytest.fixture
def package(cascade: Cascade, models: dict[str, PatchedModel], tmp_path: Path) -> Path:
    export = tmp_path / "export"
    next(iter(models.values())).backbone.save(export / "backbone.safetensors")
    for name, model in models.items():
        preprocessing = {"resolution": SIZES[name], "mean": [0.5] * 3, "std": [0.25] * 3}
        patches.save_bundle(model, export / f"{name}.patch", classes=[*"abcde"], preprocessing=preprocessing)
    save_package(cascade, tmp_path / "five.cascade", export)
    return tmp_path / "five.cascade"


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_label_stage_and_cost_are_those_of_the_fit_at_every_batch_size(
    batch: int, cascade: Cascade, package: Path, images: list[Tensor], predictions: Predictions
) -> None:
    model = CascadeModel.load(package)
    for point in cascade.points:
        expected = point.answer(
            IMAGES, 5, lambda number, places, p=point: predictions.logits[p.stages[number].model][places]
        )
        parts = [model(images[start : start + batch], max_cost=point.mean_cost) for start in range(0, IMAGES, batch)]
        labels, stages, costs, logits = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("labels", "stages", "costs", "logits")
        )
        assert np.array_equal(labels, expected.labels)
        assert np.array_equal(stages, expected.stages)
        assert np.array_equal(costs, expected.costs)
        np.testing.assert_allclose(logits, expected.logits, atol=1e-5)
        assert costs.sum() / IMAGES == point.mean_cost
        assert (labels == predictions.labels).mean() == point.accuracy
    assert max(len(point.stages) for point in cascade.points) >= 3  # else early exit was not tried


def test_thresholds_stay_clear_of_every_score(cascade: Cascade, predictions: Predictions) -> None:
    for point in cascade.points:
        answers = point.answer(
            IMAGES, 5, lambda number, places, p=point: predictions.logits[p.stages[number].model][places]
        )
        for number, stage in enumerate(point.stages[:-1]):
            here = answers.stages >= number
            scores = stage.rule.scores(predictions.logits[stage.model][here])
            assert np.abs(scores - stage.threshold).min() >= MIN_GAP / 2 * (1 - 1e-6)


def test_only_undecided_images_go_on_and_shared_steps_run_once(
    images: list[Tensor], models: dict[str, PatchedModel], views: dict[str, Preprocessing], predictions: Predictions
) -> None:
    pool = predictions.only(["last16", "other16"])
    costs = Costs("MACs", {"last16": 10, "other16": 101}, {("other16", "last16"): 9})
    answers_of = {name: logits.argmax(axis=1) for name, logits in pool.logits.items()}
    labels = np.where(sure_third(pool.logits["last16"]), answers_of["last16"], answers_of["other16"])
    cascade = fit(Predictions(pool.rows, labels, pool.logits), costs, reference="other16")
    stages = cascade.point().stages
    assert [stage.model for stage in stages] == ["last16", "other16"]
    assert stages[1].cost == 92

    model = CascadeModel(cascade, models, views)
    stem, heads = [], {}
    model.trunk.network.get_submodule("features.0").register_forward_pre_hook(lambda _, x: stem.append(len(x[0])))
    for name in ("last16", "other16"):
        head = model.models[name].network.get_submodule("classifier.1")
        head.register_forward_pre_hook(lambda _, x, name=name: heads.update({name: len(x[0])}))
    answers = model(images)

    assert stem == [IMAGES]
    assert heads == {"last16": IMAGES, "other16": (answers.stages == 1).sum()}
    assert 0 < heads["other16"] < IMAGES
    assert set(answers.costs) == {10.0, 102.0}


def test_no_image_is_no_answer(package: Path) -> None:
    answers = CascadeModel.load(package)([])
    assert (len(answers.labels), answers.logits.shape) == (0, (0, 5))


def test_images_must_be_pixels(package: Path) -> None:
    with pytest.raises(CascadeError, match=r"Found an image of shape \[3, 8, 8\] and type torch.float32"):
        CascadeModel.load(package)(torch.zeros(2, 3, 8, 8))


def test_a_package_and_its_json_say_the_same_cascade(cascade: Cascade, package: Path, tmp_path: Path) -> None:
    save_cascade(cascade, tmp_path / "cascade.json")

    assert load_cascade(package) == load_cascade(tmp_path / "cascade.json") == cascade
    with zipfile.ZipFile(package) as opened:
        bundles = {f"bundles/{name}.patch" for name in cascade.models}
        assert set(opened.namelist()) == {"cascade.json", "backbone.safetensors"} | bundles
    with pytest.raises(CascadeError, match="without its bundles"):
        CascadeModel.load(tmp_path / "cascade.json")


def repack(package: Path, **members: bytes | None) -> Path:
    """A copy in which members have another content, or are gone."""
    changed = package.with_name("changed.cascade")
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            content = members.get(Path(name).stem, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return changed


def test_a_package_whose_parts_do_not_belong_together_is_refused(cascade: Cascade, package: Path) -> None:
    name = cascade.models[0]
    export = package.parent / "export"
    randomised(small_backbone(seed=5), 5).save(export / "other.safetensors")
    other = (export / "other.safetensors").read_bytes()
    with pytest.raises(CascadeError, match=r"'backbone\.safetensors' is not the one"):
        CascadeModel.load(repack(package, backbone=other))
    with pytest.raises(CascadeError, match=f"'bundles/{name}.patch' is not the one"):
        CascadeModel.load(repack(package, **{name: (export / f"{cascade.models[1]}.patch").read_bytes()}))
    with pytest.raises(CascadeError, match=f"no whole 'bundles/{name}.patch'"):
        CascadeModel.load(repack(package, **{name: None}))
    with pytest.raises(patches.BundleError):
        CascadeModel.load(repack(package, **{name: b"short"}))


def test_a_package_without_a_bundle_is_not_written(cascade: Cascade, package: Path, tmp_path: Path) -> None:
    (package.parent / "export" / f"{cascade.models[0]}.patch").unlink()
    with pytest.raises(CascadeError, match=r"Run `multitask export RUN`"):
        save_package(cascade, tmp_path / "new.cascade", tmp_path / "export")
    assert not (tmp_path / "new.cascade").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "expected format 1, found 9"),
        ({"points": []}, "found no whole cascade"),
        ({"costs": None}, "found no whole cascade"),
        ({"asked": 99}, "found no whole cascade"),
    ],
)
def test_a_changed_json_is_refused(change: dict[str, object], message: str, cascade: Cascade, tmp_path: Path) -> None:
    path = tmp_path / "cascade.json"
    save_cascade(cascade, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CascadeError, match=message):
        load_cascade(path)


def test_a_stage_after_one_that_always_answers_is_refused(cascade: Cascade, tmp_path: Path) -> None:
    path = tmp_path / "cascade.json"
    save_cascade(cascade, path)
    content = json.loads(path.read_text())
    content["points"][0]["stages"] *= 2
    path.write_text(json.dumps(content))
    with pytest.raises(CascadeError, match="the last stage, and it alone, has no threshold"):
        load_cascade(path)


def test_what_is_no_cascade_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no")
    for name in ("text", "none"):
        with pytest.raises(CascadeError, match="found neither"):
            load_cascade(tmp_path / name)


def test_models_of_one_cascade_are_matched_by_the_names_of_their_classes(package: Path, images: list[Tensor]) -> None:
    expected = CascadeModel.load(package)(images)
    cascade, models, views = open_package(package)
    assert {model.classes for model in models.values()} == {tuple("abcde")}
    order = [3, 0, 4, 1, 2]
    model = models[cascade.models[1]]
    model.classes = tuple("abcde"[place] for place in order)
    state = {name: tensor[order] if "classifier" in name else tensor for name, tensor in model.private_state().items()}
    model.load_private_state(state)

    reordered = CascadeModel(cascade, models, views)
    found = reordered(images)

    for name in ("labels", "stages", "costs"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert len(set(found.stages)) > 1
    assert reordered.classes == tuple("abcde")
    model.classes = ("another", *model.classes[1:])
    with pytest.raises(CascadeError, match=r"have different classes: .*'another'"):
        CascadeModel(cascade, models, views)


def test_bundles_of_different_classes_make_no_package(
    cascade: Cascade, models: dict[str, PatchedModel], package: Path, tmp_path: Path
) -> None:
    name, export = cascade.models[0], package.parent / "export"
    info = patches.inspect_bundle(export / f"{name}.patch")
    classes = ["another", *info.classes[1:]]
    patches.save_bundle(models[name], export / f"{name}.patch", classes=classes, preprocessing=info.preprocessing)

    with pytest.raises(CascadeError, match=r"have different classes: .*'another'"):
        save_package(cascade, tmp_path / "new.cascade", export)
    assert not (tmp_path / "new.cascade").exists()


def test_models_must_be_there_and_on_one_backbone(
    cascade: Cascade, models: dict[str, PatchedModel], views: dict[str, Preprocessing]
) -> None:
    name = cascade.models[0]
    with pytest.raises(CascadeError, match=f"needs the models {name}"):
        CascadeModel(cascade, {other: model for other, model in models.items() if other != name}, views)
    stranger = patches.attach(small_backbone(seed=1), "scale_bias")
    with pytest.raises(CascadeError, match="several backbones"):
        CascadeModel(cascade, {**models, name: stranger}, views)
