"""Write the files of version 0.1 that `tests/test_v0_1.py` reads with today's code.

The files were made on commit 1c22242eb30f1a180ac533f154ed91fc891ecab7, the last one before the code was put into rooms.
This script runs on that commit only; no test runs it:

    cd CHECKOUT_OF_1c22242 && export PYTHONPATH=$PWD
    python -P THIS_FILE EMPTY_FOLDER

All runs use engine `local`, and no Ray is started.

After the runs, the script edits three things. Paths in the files become relative to the folder. `status.json` names the
machine "host" and no MLflow run, because MLflow's database stays out of the fixture. One worker of the stopped run gets
two refused pushes, and the run gets three calls that were turned away, so that the counters have values to be read: in
the checkpoint, which the code of the commit saves again, and in `status.json`.
"""
# ruff: noqa: I001 -- some of these modules no longer exist, so that ruff takes them for another project's.

import contextlib
import json
import os
import shutil
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from multitask.cascade import (
    Cascade,
    CascadeModel,
    OperatingPoint,
    Predictions,
    check,
    load_cascade,
    read_predictions,
    save_package,
)
from multitask.cascade.from_run import cascade_from_run
from multitask.cascade.greedy import Stage
from multitask.cascade.rules import Rule
from multitask.checkpoint import CheckpointStore
from multitask.data import open_table, write_table
from multitask.data.transforms import decode
from multitask.runs import evaluate_models, open_export
from multitask.sweep.outcomes import choose, read_outcome
from multitask.sweep.plan import plan_trials
from multitask.sweep.run import _text
from multitask.sweep.spec import load_sweep
from multitask.trainer import Stopped, Trial, resume, train
from tests.conftest import png

ROWS = 40
REFUSED, TURNED_AWAY = 2, 3


def spec(name: str) -> dict[str, Any]:
    """Return a job of two resolutions of one data set; the task `pets_12` has two workers."""
    return {
        "name": name,
        "backbone": {
            "name": "mobilenet_v2",
            "num_classes": 4,
            "options": {
                "stem_stride": 1,
                "inverted_residual_setting": [[1, 8, 1, 1], [2, 8, 2, 1], [2, 8, 1, 1]],
                "last_channel": 16,
                "dropout": 0.0,
            },
        },
        "task_defaults": {"method": "scale_bias+last_layer", "num_classes": 4, "batch_size": 8, "data": "table"},
        "tasks": [{"name": "pets_8", "resolution": 8}, {"name": "pets_12", "resolution": 12, "workers": 2}],
        "train_shared": True,
        "steps": 12,
        "evaluate_every": 6,
        "optimizer": {"name": "adamw", "rate": 0.01},
        "schedule": {"name": "cosine"},
        "checkpoints": {"keep": 1},
        "engine": {"name": "local"},
        "directory": name,
    }


def make_table() -> None:
    for number, split in enumerate(("train", "validation", "test")):
        images = ((png(1000 * number + row, row % 4), row % 4) for row in range(ROWS))
        write_table(Path("table") / split, images, [f"class {label}" for label in range(4)])


def make_finished_run() -> dict[str, Any]:
    """Train, export and evaluate, and fit a cascade. Return what the code of the commit answers."""
    run = train(spec("finished"))
    fitted, test = cascade_from_run(run, "pets.cascade", min_relative_accuracy=0.9)
    cascade = two_stages(fitted, test)
    save_package(cascade, "pets.cascade", "finished/export")
    _, models = run.models("best")
    metrics = {split: evaluate_models(models, run.spec, split) for split in ("validation", "test")}

    table = open_table("table/test")
    images = [decode(torch.frombuffer(bytearray(table.row(row).image), dtype=torch.uint8)) for row in range(ROWS)]
    answers = CascadeModel.load("pets.cascade")(images)
    checked = check(load_cascade("pets.cascade"), read_predictions("finished/predictions/test"), cascade.point())

    backbone, bundled = open_export(Path("finished/export"))
    for model in bundled.values():
        model.eval()
    x = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = {name: model(x) for name, model in bundled.items()}
    save_file(logits, "expected/bundle_logits.safetensors")
    return {
        "metrics": metrics,
        "backbone_hash": backbone.content_hash(),
        "curves": {name: task["curve"] for name, task in run.result["tasks"].items()},
        "cascade": {
            "labels": answers.labels.tolist(),
            "stages": answers.stages.tolist(),
            "costs": answers.costs.tolist(),
            "accuracy": checked.accuracy.mean,
            "mean_cost": checked.mean_cost.mean,
        },
    }


def two_stages(fitted: Cascade, pool: Predictions) -> Cascade:
    """Return a cascade of which `pets_8` answers half of the images; fitting such easy images needs only one model."""
    stage = replace(fitted.point().stages[0], model="pets_8")
    threshold = float(np.median(stage.rule.scores(pool.logits["pets_8"])))
    last = Stage("pets_12", Rule("entropy"), None, fitted.costs.alone["pets_12"], 10, 8)
    return replace(fitted, points=(OperatingPoint(0.9, (replace(stage, threshold=threshold, answered=10), last)),))


def make_stopped_run() -> None:
    """Stop a run after some steps, set its counters, and keep what the code of the commit makes of its rest."""
    asked = count()
    with contextlib.suppress(Stopped):
        train(spec("stopped"), trial=Trial(wants_stop=lambda: next(asked) >= 5))
    store = CheckpointStore("stopped/checkpoints", keep=1)
    checkpoint = store.latest()
    assert checkpoint is not None
    assert 0 < checkpoint.progress.workers["pets_8/0"].step < 12
    checkpoint.progress.workers["pets_8/0"].refused = REFUSED
    checkpoint.progress.turned_away = TURNED_AWAY
    store.save(checkpoint)

    shutil.copytree("stopped", "resumed")
    resumed = resume(Path("resumed"))
    assert resumed.result["tasks"]["pets_8"]["refused_pushes"] == REFUSED
    assert resumed.result["turned_away"] == TURNED_AWAY
    Path("resumed/last.safetensors").rename("expected/resumed.safetensors")
    shutil.rmtree("resumed")


def make_sweep() -> dict[str, Any]:
    """Train the two trials of a sweep, and keep the files that say how they ended.

    The trials train here one after the other, with the same plans and files as under Ray Tune.
    """
    job = {key: value for key, value in spec("job").items() if key not in ("name", "directory", "checkpoints")}
    job |= {"steps": 4, "evaluate_every": 2, "tasks": [{"name": "pets_8", "resolution": 8}]}
    space = {"optimizer.rate": {"grid": [0.001, 0.03]}}
    sweep = load_sweep({"name": "sweep", "directory": "sweep", "job": job, "space": space})
    plans = plan_trials(sweep)
    for plan in plans:
        train(plan.spec)
        for name in ("best.safetensors", "last.safetensors", "log.jsonl"):
            (plan.directory / name).unlink()
    Path("sweep/sweep.yaml").write_bytes(_text(sweep))
    outcomes = [read_outcome(plan) for plan in plans]
    choice = choose(outcomes)
    assert choice is not None
    return {
        "states": [outcome.state for outcome in outcomes],
        "top1": [outcome.top1 for outcome in outcomes],
        "trained_parameters": [outcome.trained_parameters for outcome in outcomes],
        "choice": choice.trial.number,
    }


def edit_status(path: Path, counters: bool) -> None:
    status = json.loads(path.read_text())
    status |= {"host": "host", "process": 1, "process_start": None, "mlflow_run_id": None}
    if counters:
        status["turned_away"] = TURNED_AWAY
        status["tasks"]["pets_8"]["refused"] = REFUSED
    path.write_text(json.dumps(status, indent=2) + "\n")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    Path("expected").mkdir()
    make_table()
    expected = make_finished_run()
    make_stopped_run()
    expected["sweep"] = make_sweep()
    Path("expected/answers.json").write_text(json.dumps(expected, indent=1) + "\n")
    for path in Path().rglob("status.json"):
        edit_status(path, counters=path.parent.name == "stopped")
    for path in (*Path().rglob("*.yaml"), *Path().rglob("*.json")):
        path.write_text(path.read_text().replace(f"{folder.resolve()}/", ""))
    Path("mlflow.db").unlink()
    shutil.rmtree("mlflow-artifacts", ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
