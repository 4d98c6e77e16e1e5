"""From folders of photos to names of classes: with commands and a job spec, and from Python alone."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import multitask
from multitask.cascade import read_predictions
from multitask.data import open_table, sources
from multitask.data.importing import import_table
from tests import browser
from tests.jobs.command import multitask as command
from tests.journeys.photos import CLASSES, KINDS, write_photos

SPEC = """
name: sides
backbone: {name: mobilenet_v2, options: {stem_stride: 1, last_channel: 32, dropout: 0.0,
  inverted_residual_setting: [[1, 8, 1, 1], [4, 16, 1, 2], [4, 16, 1, 2]]}}
tasks:
  - {name: photos, data: tables, method: full, resolution: 24, batch_size: 24, undecodable: skip}
train_shared: false
steps: 60
evaluate_every: 20
optimizer: {name: adamw, rate: 0.01}
engine: {name: local}
directory: runs/sides
"""
SPLITS = {"train": 0.6, "validation": 0.2, "test": 0.2}


def fresh_process(module: str, *arguments: object) -> tuple[Any, str]:
    """Return the JSON that a module prints in a process of its own, and what it prints on standard error."""
    asked = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(asked, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def evaluated(run: Path, tables: Path, photos: Path, predictions: Path) -> tuple[list[Path], list[list[float]]]:
    """Return the test photos that can be decoded and their logits, as `multitask evaluate` computes them."""
    done = command("evaluate", run, "--save-predictions", predictions)
    assert done.returncode == 0, done.stderr
    ids = [group.ids[place] for group in open_table(tables / "test").groups() for place in range(len(group))]
    found = read_predictions(predictions)
    return [photos / ids[row] for row in found.rows], found.logits["photos"].tolist()


def look_at_report(page: Path) -> None:
    """Open the page in a browser, if there is one, at a desk and on a telephone."""
    assert all(name in page.read_text() for name in CLASSES)
    for seen in browser.look(page) if browser.CHROMIUM else ():
        assert (seen.cut, seen.scrolls) == ([], [])
        assert all(name in seen.text for name in CLASSES)


def by_commands(folder: Path) -> None:
    def run(*arguments: object) -> str:
        done = command(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    splits = [text for name, share in SPLITS.items() for text in ("--split", f"{name}={share}")]
    imported = run("data", "import", "imagefolder", folder / "photos", folder / "tables", *splits)
    assert "hidden" in imported
    (folder / "sides.yaml").write_text(SPEC)
    assert len(SPEC.strip().splitlines()) <= 12
    run("train", folder / "sides.yaml")
    look_at_report(folder / "runs" / "sides" / "report.html")
    run("export", folder / "runs" / "sides")


def from_python(folder: Path) -> None:
    import_table(sources.image_folder(folder / "photos"), folder / "tables", splits=SPLITS)
    spec: dict[str, Any] = yaml.safe_load(SPEC)
    spec["tasks"][0]["data"] = str(folder / "tables")
    spec["directory"] = str(folder / "runs" / "sides")
    run = multitask.train(multitask.load_spec(spec))
    run.export()
    multitask.write_report(run.directory)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("journey", [by_commands, from_python])
def test_photos_of_all_kinds_get_the_right_names(
    journey: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", each=8)

    journey(tmp_path)

    run, photos = tmp_path / "runs" / "sides", tmp_path / "photos"
    tested, logits = evaluated(run, tmp_path / "tables", photos, tmp_path / "predictions")
    (tmp_path / "elsewhere").mkdir()
    export = Path(shutil.move(run, tmp_path / "elsewhere" / "sides")) / "export"
    shutil.rmtree(tmp_path / "tables")
    assert fresh_process("tests.journeys.answers", export, 24, *tested)[0] == logits

    shutil.rmtree(photos)
    write_photos(tmp_path / "never imported", each=2, seed=1)
    found, said = fresh_process("jobs.cli", "predict", export, tmp_path / "never imported", "--json")
    assert found["answered"] == 2 * len(CLASSES) * len(KINDS)
    for answer in found["answers"]:
        assert answer["class"] == Path(answer["file"]).parent.name
    assert "cut off.jpg: " in said
    assert "1 of 37 files cannot be decoded." in said
