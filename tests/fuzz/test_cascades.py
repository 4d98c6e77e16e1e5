"""Cascades that were damaged, and cascades that somebody wrote on purpose: as JSON, and as packages."""

import io
import math
import zipfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

import patches
from multitask.cascade import Cascade, CascadeError, CascadeModel, load_cascade, save_cascade, save_package
from tests.fuzz.damage import damaged, rewritten
from tests.fuzz.harness import fuzz
from tests.multitask.cascade.pools import made_cascade
from tests.patches.helpers import small_backbone

CASCADE = made_cascade()
CLASSES = [*"abcde"]
SHOWN = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("export")
    backbone = small_backbone()
    backbone.save(folder / "backbone.safetensors")
    for number, name in enumerate(CASCADE.models):
        patches.save_bundle(
            patches.attach(backbone, "last_layer", 5, seed=number),
            folder / f"{name}.patch",
            classes=CLASSES,
            preprocessing={"resolution": 16, "mean": [0.5] * 3, "std": [0.25] * 3},
        )
    save_package(CASCADE, folder / "whole.cascade", folder)
    return (folder / "whole.cascade").read_bytes()


def repacked(random: Random, whole: bytes) -> bytes:
    """Return another package: with changed members, members of other names, or other flags."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w") as new:
        names = old.namelist()
        chosen = random.choice(names)
        for name in names:
            data, kind = old.read(name), random.choice(("damaged", "gone", "renamed", "compressed", "json", "json"))
            if name == "cascade.json" and kind == "json":
                data = rewritten(random, data)
            elif name == chosen and kind == "damaged":
                data = damaged(random, data)
            if name != chosen or kind != "gone":
                member = random.choice((*names, "x")) if name == chosen and kind == "renamed" else name
                method = zipfile.ZIP_DEFLATED if name == chosen and kind == "compressed" else zipfile.ZIP_STORED
                new.writestr(member, data, method)
    data = buffer.getvalue()
    if random.random() < 0.2:  # the flag of encryption, in the list of members at the end
        place = data.rindex(b"PK\x01\x02")
        data = data[: place + 8] + b"\x01\x00" + data[place + 10 :]
    return data


def check(cascade: Cascade) -> None:
    """Fail unless everything that a cascade is asked for can be computed."""
    for point in cascade.points:
        numbers = (point.accuracy, point.mean_cost, point.worst_cost, point.mean_in(cascade.costs))
        assert all(map(math.isfinite, numbers))
        assert point.accuracy >= 0
        for stage in point.stages:
            assert stage.threshold is None or stage.rule.threshold_text(stage.threshold)
        logits = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
        answers = point.answer(7, 5, lambda _, places, logits=logits: logits[places])
        assert np.isfinite(answers.costs).all()
    if cascade.latency is not None:
        assert cascade.point(max_latency_ms=1e300).mean_in(cascade.latency) >= 0
    assert cascade.point(max_cost=1e300) in cascade.points


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_cascade_is_whole_or_refused(package: bytes, tmp_path: Path) -> None:
    save_cascade(CASCADE, tmp_path / "whole.json")
    text = (tmp_path / "whole.json").read_bytes()
    path = tmp_path / "task.cascade"
    kinds: list[str] = []

    def make(random: Random) -> bytes:
        kinds[:] = [random.choice(("json", "json", "damaged json", "package", "package", "damaged package"))]
        data = {
            "json": lambda: rewritten(random, text),
            "damaged json": lambda: damaged(random, text),
            "package": lambda: repacked(random, package),
            "damaged package": lambda: damaged(random, package),
        }[kinds[0]]()
        path.write_bytes(data)
        return data

    def read(data: bytes) -> None:
        found = load_cascade(path)
        check(found)
        save_cascade(found, tmp_path / "again.json")
        assert load_cascade(tmp_path / "again.json") == found
        if data.startswith(b"PK"):
            assert kinds[0] != "damaged package" or found == CASCADE, "a changed byte was not found"
            answers = CascadeModel.load(path)(SHOWN)
            assert np.isfinite(answers.logits).all()

    fuzz("cascades", 40, (CascadeError, patches.BundleError, patches.BackboneError), make, read)
