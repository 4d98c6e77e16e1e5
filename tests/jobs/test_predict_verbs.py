"""`multitask predict` on the export and the cascade of version 0.1."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import patches
from multitask.cascade import CascadeModel, read_predictions
from multitask.data import open_table
from multitask.run.directory import Run, evaluate_models
from patches.images.reading import read_pixels
from tests.jobs.command import multitask
from tests.multitask.data.tables import encoded

V0_1 = Path(__file__).parents[1] / "data" / "v0_1"
EXPORT, CASCADE = V0_1 / "finished" / "export", V0_1 / "pets.cascade"
CLASSES = [f"class {label}" for label in range(4)]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The test images as files, in folders with other things; their paths below the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos/.cache", "photos/b"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("photos/.cache/0.png", "photos/._a.png", "photos/notes.txt"):
        (tmp_path / name).write_bytes(b"not a photo")
    images = encoded(open_table(str(V0_1 / "table" / "test")))
    paths = [f"photos/{'b/' if row % 3 else ''}{row:02d}.png" for row in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        (tmp_path / path).write_bytes(image)
    return paths


def test_photos_get_the_logits_of_an_evaluation_bit_for_bit(photos: list[str], tmp_path: Path) -> None:
    bank, spec = patches.open_export(EXPORT), Run(V0_1 / "finished").spec
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(V0_1)  # the spec's paths are relative to it
        evaluate_models(bank.models, spec, "test", tmp_path / "predictions")
    evaluated = read_predictions(tmp_path / "predictions").logits
    for task in spec.tasks:
        answers = bank.predict(photos, task.name, batch_size=task.batch_size)
        assert torch.equal(torch.stack([answer.logits for answer in answers]), torch.tensor(evaluated[task.name]))

    found = multitask("predict", EXPORT, *photos, "--task", "pets_12", "--json")

    printed = json.loads(found.stdout)
    assert (found.returncode, printed["answered"], printed["undecodable"]) == (0, len(photos), [])
    assert [answer["file"] for answer in printed["answers"]] == photos
    probabilities = torch.tensor(evaluated["pets_12"]).double().softmax(dim=1)
    for answer, expected in zip(printed["answers"], probabilities, strict=True):
        assert answer["probabilities"] == pytest.approx(dict(zip(CLASSES, expected.tolist(), strict=True)), rel=1e-5)
        assert answer["class"] == CLASSES[int(expected.argmax())]
        assert (answer["task"], answer["probability"]) == ("pets_12", answer["probabilities"][answer["class"]])


def test_a_folder_gives_its_image_files_and_the_others_are_counted(photos: list[str]) -> None:
    found = multitask("predict", EXPORT, "photos", "--task", "pets_8")
    assert found.returncode == 0, found.stderr
    assert [path for path in photos if path not in found.stdout] == []
    assert "Left aside: hidden files and folders (2), files .txt (1)." in found.stderr
    assert sum(name in line for line in found.stdout.splitlines() for name in CLASSES) == len(photos)


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_answer_files_have_the_answers(photos: list[str], tmp_path: Path, ending: str) -> None:
    arguments = ("predict", EXPORT, *photos, "--task", "pets_12")
    wanted = json.loads(multitask(*arguments, "--json").stdout)["answers"]
    path = tmp_path / "new" / f"answers.{ending}"

    done = multitask(*arguments, "--to", path)

    assert (done.returncode, done.stdout) == (0, f"{path}: answers for {len(photos)} images\n")
    if ending == "jsonl":
        assert [json.loads(line) for line in path.read_text().splitlines()] == wanted
        return
    rows = list(csv.DictReader(path.read_text().splitlines())) if ending == "csv" else pq.read_table(path).to_pylist()
    assert list(rows[0]) == ["file", "task", "class", "probability", *(f"probability of {name}" for name in CLASSES)]
    for row, answer in zip(rows, wanted, strict=True):
        assert {name: row[name] for name in ("file", "task", "class")}.items() <= answer.items()
        numbers = [float(np.float32(number)) for number in list(row.values())[3:]]
        assert numbers == [float(np.float32(n)) for n in (answer["probability"], *answer["probabilities"].values())]


def test_a_cascade_answers_with_the_model_of_the_stage_that_is_sure(photos: list[str]) -> None:
    found = json.loads(multitask("predict", CASCADE, "photos", "--json").stdout)
    model = CascadeModel.load(CASCADE)
    expected = model([read_pixels(path) for path in photos])
    stages = [stage.model for stage in model.cascade.point().stages]
    wanted = {
        path: (CLASSES[label], stages[stage])
        for path, label, stage in zip(photos, expected.labels, expected.stages, strict=True)
    }
    assert {answer["file"]: (answer["class"], answer["task"]) for answer in found["answers"]} == wanted
    refused = multitask("predict", CASCADE, "photos", "--task", "pets_8")
    assert (refused.returncode, "Leave --task out" in refused.stderr) == (1, True)


def test_files_that_cannot_be_decoded_are_named_counted_and_skipped(photos: list[str]) -> None:
    for name, content in (("photos/bad.jpg", b"no image"), ("photos/empty.png", b"")):
        Path(name).write_bytes(content)
    arguments = ("predict", EXPORT, "photos/bad.jpg", photos[0], "photos/empty.png", "--task", "pets_8")

    found = multitask(*arguments, "--json")

    answers = json.loads(found.stdout)
    assert (found.returncode, answers["answered"], answers["answers"][0]["file"]) == (0, 1, photos[0])
    assert [bad["file"] for bad in answers["undecodable"]] == ["photos/bad.jpg", "photos/empty.png"]
    assert "photos/empty.png: it is empty" in found.stderr
    assert "2 of 3 files cannot be decoded." in found.stderr
    assert "━" not in found.stderr, "a bar belongs on a terminal"

    none = multitask("predict", EXPORT, "photos/bad.jpg", "--task", "pets_8", "--to", "answers.csv")
    assert none.returncode == 1
    assert "photos/bad.jpg: " in none.stderr
    assert "error: None of the files can be decoded" in none.stderr
    assert not Path("answers.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((EXPORT, "photos"), "because there are 2: pets_12, pets_8. Name one of them: `--task NAME`"),
        ((EXPORT, "photos", "--task", "pets"), "Did you mean"),
        ((EXPORT, "photos", "none.jpg", "--task", "pets_8"), "'none.jpg': found no such file or folder"),
        ((EXPORT, "empty", "--task", "pets_8"), "Found no image file in empty"),
        (("photos", "photos"), "Run `multitask export RUN`"),
        ((EXPORT, "photos", "--task", "pets_8", "--to", "answers.txt"), "ends in .parquet, .csv, .jsonl"),
    ],
)
@pytest.mark.usefixtures("photos")
def test_what_is_wrong_is_said_before_an_image_is_read(arguments: tuple[object, ...], message: str) -> None:
    Path("empty").mkdir()
    found = multitask("predict", *arguments)
    assert (found.returncode, found.stdout) == (1, "")
    assert message in found.stderr
