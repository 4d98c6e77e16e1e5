"""The way from a run to a cascade with commands only."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.cascade_verbs import fitting_hint
from multitask import train
from multitask.cascade import Costs, fit_and_check, predictions_writer, read_predictions
from multitask.cascade.checking import Interval
from multitask.run.directory import Run
from multitask.spec.schema import JobSpec
from tests.conftest import MakeData
from tests.jobs.command import multitask
from tests.multitask.cascade.pools import make_predictions


@pytest.fixture
def run(make_spec: Callable[..., JobSpec], make_data: MakeData) -> Path:
    """An exported run of two resolutions of one data set, with predictions on its validation and test images."""
    data = make_data(rows=120, seed=7, size=16)
    tasks: dict[str, dict[str, Any]] = {f"pets_{size}": {"resolution": size, "data": data} for size in (8, 12)}
    found = train(make_spec(tasks, steps=30, evaluate_every=30)).directory
    assert multitask("export", found).returncode == 0
    for split in ("validation", "test"):
        done = multitask("evaluate", found, "--split", split, "--save-predictions", found / split, "--json")
        assert done.returncode == 0, done.stderr
        predictions = read_predictions(found / split)
        for task, metrics in json.loads(done.stdout).items():
            assert 100 * predictions.right(task).mean() == pytest.approx(metrics["top1"])
    return found


def test_fit_evaluate_run_and_plot(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, export = tmp_path / "pets.cascade", run / "export"
    fitted = multitask(
        *("cascade", "fit", run / "validation", "--to", package, "--export", export),
        *("--min-relative-accuracy", 0.9, "--slack", 0, "--points", 4, "--latency", "--json"),
    )
    assert fitted.returncode == 0, fitted.stderr
    assert json.loads(fitted.stdout)["images"] == 60

    checked = multitask("cascade", "evaluate", package, run / "test", "--json")
    assert checked.returncode == 0, checked.stderr
    check = json.loads(checked.stdout)
    assert [single["model"] for single in check["singles"]] == ["pets_8", "pets_12"]
    again = multitask("cascade", "evaluate", package, run / "validation")
    assert (again.returncode, "thresholds were fitted on" in again.stderr) == (1, True)
    shown = multitask("cascade", "evaluate", package, run / "test", "--max-latency-ms", 1e6).stdout
    assert "pets_8" in shown
    assert "of 120 images rightly" in shown

    table = Run(run).spec.tasks[0].data + "/test"
    monkeypatch.setattr("multitask.progress.LINE_EVERY_S", 0)
    options = ("--to", tmp_path / "answers.parquet", "--batch-size", 50, "--json")
    ran = multitask("cascade", "run", package, table, *options)
    assert ran.returncode == 0, ran.stderr
    lines = [line.partition(" images")[0] for line in ran.stderr.splitlines()]
    assert lines == [f"answering: {done} of 120" for done in (50, 100, 120)]
    found = json.loads(ran.stdout)
    assert (found["accuracy"], found["mean_cost"]) == (check["accuracy"]["mean"], check["mean_cost"]["mean"])
    assert found["shares"] == [stage["share"] for stage in check["stages"]]
    answers = pq.read_table(tmp_path / "answers.parquet")
    assert answers.column_names == ["row", "label", "answer", "stage", "cost"]
    assert np.mean(answers["label"].to_numpy() == answers["answer"].to_numpy()) == found["accuracy"]
    assert "images/s" in multitask("cascade", "run", package, table).stdout

    drawn = multitask("cascade", "plot", package, run / "test", "--to", tmp_path / "drawn", "--table", table)
    assert drawn.returncode == 0, drawn.stderr
    files = {path.name: path.read_bytes() for path in (tmp_path / "drawn").iterdir()}
    assert set(files) == {"accuracy_cost.png", "stage_shares.png", "stages.png", "cascade.html"}
    assert all(content.startswith(b"\x89PNG") for name, content in files.items() if name.endswith(".png"))
    page = files["cascade.html"].decode()
    assert page.count("data:image/png;base64,") == 5
    assert "of 120 images rightly" in page


def outside_predictions(folder: Path) -> Path:
    """Predictions of models that this project did not train."""
    random = np.random.default_rng(0)
    labels = np.arange(400) % 3
    for model, noise in (("phone", 1.0), ("server", 0.3)):
        with predictions_writer(folder / f"{model}.parquet", 3) as add:
            add(np.arange(400), labels, (np.eye(3)[labels] + noise * random.normal(size=(400, 3))).astype(np.float32))
    return folder


def test_models_from_elsewhere_take_costs_from_a_table(tmp_path: Path) -> None:
    predictions = outside_predictions(tmp_path / "predictions")
    (tmp_path / "costs.csv").write_text("model,energy_mj\nphone,1\nserver,20\n")
    fitted = multitask(
        *("cascade", "fit", predictions, "--to", tmp_path / "cascade.json", "--slack", 0),
        *("--cost-table", tmp_path / "costs.csv", "--cost-column", "energy_mj", "--json"),
    )
    assert fitted.returncode == 0, fitted.stderr
    check = json.loads(fitted.stdout)
    assert check["unit"] == "energy_mj"
    assert [stage["model"] for stage in check["stages"]] == ["phone", "server"]
    assert check["saving"]["mean"] > 0

    costs = ("--cost-table", tmp_path / "costs.csv", "--cost-column", "energy_mj")
    alone = multitask("cascade", "fit", predictions, "--to", tmp_path / "alone.json", "--slack", 0.5, *costs)
    assert "Try a smaller --slack" in alone.stdout

    refused = multitask("cascade", "run", tmp_path / "cascade.json", "somewhere")
    assert (refused.returncode, "without its bundles" in refused.stderr) == (1, True)


@pytest.mark.parametrize(
    ("pool", "options", "target", "hint"),
    [
        ({"small": 1.5, "large": 5.0}, {"slack": 0.0}, "--min-relative-accuracy", None),
        ({"large": 5.0}, {}, "--min-relative-accuracy", "A cascade needs two models or more"),
        (
            {"small": 1.5, "large": 5.0},
            {"reference": "small"},
            "--min-relative-accuracy",
            "Model 'small' is the cheapest one and the reference",
        ),
        ({"small": 0.0, "large": 5.0}, {"max_mean_cost": 1e9}, "--max-cost", "Ask for a smaller --max-cost"),
        (
            {"small": 1.5, "large": 5.0},
            {"slack": 0.5},
            "--min-accuracy",
            "on the 200 fitting images to answer before the reference. Try a smaller --slack (it was 0.5) or "
            "--min-accuracy, or more images.",
        ),
        (
            {"small": 0.0, "large": 5.0},
            {"slack": 0.0},
            "--min-relative-accuracy",
            "Try a smaller --min-relative-accuracy, or more images.",
        ),
    ],
)
def test_the_hint_after_a_fit_names_what_would_help(
    pool: dict[str, float], options: dict[str, Any], target: str, hint: str | None
) -> None:
    costs = Costs("MACs", {"small": 10.0, "large": 90.0})
    cascade, checked = fit_and_check(make_predictions(pool=pool), costs, **options)
    found = fitting_hint(cascade, checked, target)
    assert found is None if hint is None else hint in str(found)


def test_the_hint_says_that_a_cascade_takes_more_than_its_reference() -> None:
    costs = Costs("MACs", {"small": 10.0, "large": 90.0})
    cascade, checked = fit_and_check(make_predictions(pool={"small": 1.5, "large": 5.0}), costs)
    dear = replace(checked, saving=Interval(-0.068, -0.11, -0.02))
    assert "takes more than model 'large' alone" in str(fitting_hint(cascade, dear, "--min-accuracy"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "cascade.zip"], "ends in .cascade"),
        (["--to", "x.cascade"], "Name their folder: --export"),
        (["--to", "x.json"], "from a file (--cost-table)"),
        (["--to", "x.json", "--cost-table", "costs.csv"], "Name both"),
        (["--to", "x.json", "--model", "phon"], "Did you mean 'phone'"),
    ],
)
def test_fit_says_what_is_missing(arguments: list[str], message: str, tmp_path: Path) -> None:
    refused = multitask("cascade", "fit", outside_predictions(tmp_path), *arguments)
    assert refused.returncode == 1
    assert message in refused.stderr
