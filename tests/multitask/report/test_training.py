"""The page about a training: its numbers, its words for odd cases, and names of every kind."""

import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multitask.report import training
from multitask.report.answers import Answers, surest_mistakes
from multitask.report.plots import Drawn
from multitask.report.training import TrainedRun, TrainedTask, headline, write_training_report
from tests import browser
from tests.conftest import png
from tests.jobs.test_demo_report import make_results

ODD_NAMES = ("costs $5 or $x^2$", "[b]bold[/b] [red]", "<script>alert(1)</script>", "猫と犬", "a" * 90, "two  words")


def make_task(name: str = "pets", classes: int = 6, wrong: bool = True, **changes: Any) -> TrainedTask:
    """A task with ten images of each class, of which the last class is always taken for the first."""
    names = tuple((*ODD_NAMES, *(f"class number {label}" for label in range(classes)))[:classes])
    labels = np.repeat(np.arange(classes), 10)
    answers = np.where(labels == classes - 1, 0, labels) if wrong else labels
    probabilities = np.linspace(0.3, 1, len(labels), dtype=np.float32)
    found = Answers(
        classes=names, rows=np.arange(len(labels)), labels=labels, answers=answers, probabilities=probabilities
    )
    values: dict[str, Any] = {
        "name": name,
        "method": "scale_bias+last_layer",
        "resolution": 16,
        "metrics": {"top1": 100 - 100 * wrong / classes, "top5": 98.7, "loss": 0.4321},
        "accuracy": [(10.0, 60.0), (20.0, 83.3), (30.0, 70.0)],
        "validation_loss": [(10.0, 1.5), (20.0, 0.8), (30.0, 0.9)],
        "training_loss": [(float(step), 2 - step / 20) for step in range(30)],
        "answers": found,
        "skipped": 0,
        "other_table": False,
        "trained_on": False,
        "mistakes": [(place, png(place, 2)) for place in surest_mistakes(found, 5).tolist()],
        "patch_bytes": 5_000,
        "workers": 2,
        "pushes": 1234,
        "mean_staleness": 0.75,
        "faults": {"redone steps": 0, "lost pushes": 0},
    }
    return TrainedTask(**values | changes)


def make_run(*tasks: TrainedTask, **changes: Any) -> TrainedRun:
    values: dict[str, Any] = {
        "name": "a_run",
        "directory": Path("/runs/my run"),
        "backbone": "mobilenet_v2",
        "backbone_bytes": 20_000,
        "version": 40,
        "round": 20,
        "last": (60, 70.0),
        "seconds": 4500.0,
        "facts": {"engine": "async", "steps": "30"},
        "settings": "name: a_run\nsteps: 30\n",
        "tasks": tasks or [make_task()],
    }
    return TrainedRun(**values | changes)


def written(run: TrainedRun, folder: Path) -> str:
    """Return the text of a run's page."""
    write_training_report(run, folder / "report.html")
    return (folder / "report.html").read_text()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are replaced by a dot, because drawing takes most of the time of a page."""
    monkeypatch.setattr(
        training, "drawn", lambda name, words, _: Drawn(name=name, words=words, light=png(0, 1, 1), dark=png(0, 2, 1))
    )


def test_the_page_stands_alone_and_has_the_numbers(tmp_path: Path) -> None:
    html = written(make_run(), tmp_path)

    assert not re.search(r"""(src|href|srcset)\s*=\s*["'](?!data:|#)""", html)
    assert "url(" not in html
    for text in ("83.3", "98.7", "0.432", "1,234", "0.75", "20.0 kB", "5.0 kB", "25.0%", "75 min", "steps: 30"):
        assert text in html, text
    assert "10 of 60 images" in html
    assert "The last version, 60, reached 70.0 %." in html
    assert "multitask export '/runs/my run'" in unescape(html)
    assert "multitask predict '/runs/my run/export' PHOTO...<" in unescape(html)
    several = unescape(written(make_run(make_task("pets"), make_task("cars")), tmp_path))
    assert "multitask predict '/runs/my run/export' PHOTO... --task TASK<" in several, "predict asks which of them"


@pytest.mark.usefixtures("undrawn")
def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    html = written(make_run(), tmp_path)

    assert "<script>alert" not in html
    for name in ODD_NAMES:
        assert name in unescape(html)


def test_the_headline_is_computed_from_the_tasks() -> None:
    chosen = "(version 40, the best of 3 evaluated ones)"
    one = f"83.3 % of 60 validation images of 6 classes get the right answer {chosen}."
    assert headline(make_run()) == one
    two = f"2 tasks on one mobilenet_v2: 91.7 % mean top-1 on validation images {chosen}."
    assert headline(make_run(make_task(), make_task(wrong=False))) == two


@pytest.mark.usefixtures("undrawn")
def test_many_classes_show_the_worst_ones_and_the_largest_confusions(tmp_path: Path) -> None:
    few, many = (written(make_run(make_task(classes=classes)), tmp_path) for classes in (20, 21))

    assert ("Confusion matrix" in few, "Largest confusions" in few, "more classes" in few) == (True, False, False)
    assert ("Confusion matrix" in many, "Largest confusions" in many, "11 more classes" in many) == (False, True, True)
    assert many.index("class number 14") < many.index("more classes") < many.index("class number 13")


@pytest.mark.usefixtures("undrawn")
def test_parts_without_content_say_so_or_are_left_out(tmp_path: Path) -> None:
    bare = make_task(classes=3, wrong=False, accuracy=[], validation_loss=[], training_loss=[])
    html = written(make_run(bare, last=None), tmp_path)

    assert "all 30 images get the right answer" in html
    for text in (
        "top-5",
        "lost pushes",
        "Confusion matrix",
        "<picture>",
        "could not be decoded",
        "another one",
        "The last version",
    ):
        assert text not in html, text
    noted = written(
        make_run(replace(bare, skipped=3, other_table=True, trained_on=True, faults={"lost pushes": 3})), tmp_path
    )
    assert "lost pushes" in noted
    assert "3 validation images could not be decoded" in noted
    assert "trained on its validation images too" in noted
    assert "another one than the run began with" in noted
    lacking = replace(bare.answers, classes=(*bare.answers.classes, "a class without images"))
    assert "None of these images belongs to a class without images." in written(
        make_run(replace(bare, answers=lacking)), tmp_path
    )


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason=browser.WITHOUT)
def test_a_browser_cuts_no_text_at_a_desk_and_on_a_telephone(tmp_path: Path) -> None:
    tasks = [make_task("pets"), make_task("a" * 100, classes=20), make_task("many", classes=40)]
    path = tmp_path / "report.html"
    write_training_report(make_run(*tasks), path)

    for seen in browser.look(path):
        assert seen.cut == []
        assert all("TABLE.matrix" in what for what in seen.scrolls)
        for name in ODD_NAMES:
            assert " ".join(name.split()) in seen.text
    path.write_text(path.read_text().replace("</main>", '<p style="width: 2000px; overflow: hidden">wide</p></main>'))
    assert all(seen.cut for seen in browser.look(path)), "the check finds nothing"


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason=browser.WITHOUT)
def test_a_browser_cuts_no_text_of_the_demos_report(tmp_path: Path) -> None:
    from jobs.demo.report import write_report

    for seen in browser.look(write_report(make_results(), tmp_path)):
        assert seen.cut == []
