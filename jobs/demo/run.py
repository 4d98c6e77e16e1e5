"""The demo's run: train three real tasks in three ways, export, and check the bundles in a fresh process.

Then train one of the tasks at four resolutions, and chain these models into a cascade.
"""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console

import multitask
import patches
from jobs.demo.report import BASELINE, FAIR, OURS, SEPARATE, accuracy_table, write_report
from jobs.tables import show
from multitask.cascade import Check, check
from multitask.cascade.figures import headline, section, stage_sheet
from multitask.cascade.from_run import cascade_from_run
from multitask.cluster.session import ray_session
from multitask.data import TrainBatches, open_table
from multitask.evaluation import reestimate_statistics, torch_threads
from multitask.run.directory import Export, Run, evaluate_models, write_json
from multitask.spec.reading import load_spec
from multitask.spec.schema import TaskSpec

DURATION = "about 6 minutes on two cores that do nothing else"
"""Duration of the demo with the steps of its job specs. `multitask demo` prints it at its start."""
SPECS = Path(__file__).resolve().parent.parent / "specs"
MODES = {
    OURS: ("demo.yaml", "private scale-and-bias + last layer"),
    BASELINE: ("demo_last_layer.yaml", "private last layer, all else shared"),
    SEPARATE: ("demo_independent.yaml", "three independent models"),
}
"""Mode -> its job spec and its title."""
RESOLUTIONS = "resolutions"
RESOLUTIONS_SPEC = ("demo_resolutions.yaml", "one data set at four resolutions, private scale-and-bias")
OPERATING_POINTS = 9
SLACK = 0.001
"""Slack of the cascade's fit.

After so few steps the resolutions differ by tenths of a point, so a larger slack would often leave no cascade at all.
"""
REESTIMATION_BATCHES = 40
"""Training batches of each task on which the running statistics of the fair baseline are measured."""
EXAMPLES = 10
"""Test images of each task that the report shows."""
LICENCES = {
    "fashion": "Fashion-MNIST, Copyright 2017 Zalando SE, MIT",
    "animals": "Animal-MNIST, Sina Mohammadi, MIT",
    "digits": "MNIST (Y. LeCun, C. Cortes, C. Burges), CC BY-SA 3.0",
}


def run_demo(directory: Path, steps: int | None = None) -> Path:
    """Train, export, evaluate again in a fresh process, fit a cascade, and write results, figures and report.

    Args:
        directory: receives all files; runs of an earlier demo in it are replaced.
        steps: steps of each task; by default those of the job specs.
    Returns:
        The path of the report.
    """
    console = Console()
    if steps is None:
        console.print(f"The demo takes {DURATION}.")
    start = time.perf_counter()
    directory = directory.resolve()  # absolute, because the fresh process and readers of the report may run elsewhere
    runs = _train(directory, steps, console)
    resolutions = runs.pop(RESOLUTIONS)
    console.print("exporting the models, and evaluating them on the test images")
    exports = {mode: run.export() for mode, run in runs.items()}
    rows = {mode: _mode(MODES[mode][1], run, exports[mode]) for mode, run in runs.items()}
    fair = _reestimated(runs[BASELINE], directory / FAIR)
    package = directory / "fashion.cascade"
    checked, sheet = _cascade(resolutions, package)
    run, export = runs[OURS], exports[OURS]
    fresh = _evaluate_in_a_fresh_process(run)
    results = {
        "title": "Three tasks, one backbone",
        "seconds": time.perf_counter() - start,
        "seed": run.spec.seed,
        "environment": _environment(),
        "tasks": {task.name: _task(task, directory) for task in run.spec.tasks},
        "modes": {OURS: rows[OURS], BASELINE: rows[BASELINE], FAIR: fair, SEPARATE: rows[SEPARATE]},
        "backbone": {
            "path": str(export.backbone),
            "bytes": export.backbone.stat().st_size,
            "hash": patches.inspect_bundle(next(iter(export.bundles.values()))).backbone["content_hash"],
        },
        "bundles": {
            task: {"path": str(path), "bytes": path.stat().st_size, "top1": fresh[task]["top1"]}
            for task, path in export.bundles.items()
        },
    }
    write_json(directory / "results.json", results | {"cascade": asdict(checked) | {"path": str(package)}})
    report = write_report(results | {"cascade": section(checked, sheet, str(package))}, directory)
    show(accuracy_table(results))
    print(headline(checked))
    _print_paths(directory, export, package, report)
    return report


def _train(directory: Path, steps: int | None, console: Console) -> dict[str, Run]:
    """Train the modes and the resolutions, one after the other."""
    runs = {}
    with ray_session():
        for name, (file, title) in {**MODES, RESOLUTIONS: RESOLUTIONS_SPEC}.items():
            console.print(f"[bold]{title}[/bold]")
            overrides: dict[str, Any] = {"directory": str(directory / name)} | ({"steps": steps} if steps else {})
            runs[name] = multitask.train(load_spec(SPECS / file, overrides), overwrite=True, console=console)
    return runs


def _print_paths(directory: Path, export: Export, package: Path, report: Path) -> None:
    """Print where the results are."""
    print(
        f"backbone and bundles: {export.backbone.parent}\n"
        f"cascade:              {package}\n"
        f"numbers:              {directory / 'results.json'}\n"
        f"MLflow:               mlflow ui --backend-store-uri sqlite:///{directory / 'mlflow.db'}\n"
        f"report:               {report}"
    )


def _mode(title: str, run: Run, export: Export) -> dict[str, Any]:
    """Return one row of the comparison: test accuracy of the best version, bytes on disk, facts about the training."""
    _, models = run.models("best")
    test = evaluate_models(models, run.spec, "test")
    tasks = {}
    for name, metrics in test.items():
        trained = run.result["tasks"][name]
        tasks[name] = metrics | {
            "engine": run.result["engine"],
            "process_id": trained["processes"][0],
            "pushes": trained["pushes"],
            "mean_staleness": trained["mean_staleness"],
            "curve": trained["curve"],
        }
    # Independent models need no backbone file, because their bundles contain whole networks.
    files = [*export.bundles.values()] + ([] if run.spec.tasks[0].method == "full" else [export.backbone])
    return {
        "title": title,
        "parameters": run.result["parameters"],
        "bytes": sum(file.stat().st_size for file in files),
        "seconds": run.result["seconds"],
        "tasks": tasks,
    }


def _reestimated(run: Run, folder: Path) -> dict[str, Any]:
    """Return the row of the fair baseline, and write its backbone and bundles to `folder`.

    The weights are those of the last-layer run; each task's running statistics are measured anew on its own data.
    """
    backbone, baseline = run.models("best")
    models = {}
    folder.mkdir(parents=True, exist_ok=True)
    backbone.save(folder / "backbone.safetensors")
    files = [folder / "backbone.safetensors"]
    for task in run.spec.tasks:
        model = patches.attach(backbone, "norm_statistics+last_layer", task.num_classes)
        model.classes = baseline[task.name].classes
        assert model.classes is not None, "the run has just been trained"
        model.load_private_state({**model.private_state(), **baseline[task.name].private_state()})
        table = open_table(f"{task.data}/train")
        batches = TrainBatches(
            table,
            batch_size=task.batch_size,
            resolution=task.resolution,
            mean=task.mean,
            std=task.std,
            augment="none",
            seed=run.spec.seed,
        )
        with torch_threads(run.spec.resources.threads_per_worker):
            reestimate_statistics(model, islice(batches, REESTIMATION_BATCHES))
        models[task.name] = model
        files.append(folder / f"{task.name}.patch")
        patches.save_bundle(model, files[-1], classes=model.classes, preprocessing={"resolution": task.resolution})
    return {
        "title": "private last layer, statistics re-estimated per task",
        "parameters": run.result["parameters"],
        "bytes": sum(file.stat().st_size for file in files),
        "tasks": evaluate_models(models, run.spec, "test"),
    }


def _cascade(run: Run, to: Path) -> tuple[Check, bytes]:
    """Fit a cascade over the resolutions of a run, and write it to the file `to`.

    Returns:
        What the test images say about the cascade, and a PNG of images that stop at each stage.
    """
    cascade, test = cascade_from_run(run, to, operating_points=OPERATING_POINTS, slack=SLACK)
    table = open_table(f"{run.spec.tasks[0].data}/test", verify=False)
    return check(cascade, test), stage_sheet(table, test, cascade.point())


def _evaluate_in_a_fresh_process(run: Run) -> dict[str, dict[str, float]]:
    """Return the test metrics of each task, computed by a new process that loads the exported backbone and bundles."""
    command = [sys.executable, "-m", "jobs.cli", "evaluate", str(run.directory), "--json"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"The fresh process that loads the bundles failed:\n{finished.stderr}")
    return json.loads(finished.stdout)


def _task(task: TaskSpec, directory: Path) -> dict[str, Any]:
    """Return what the report says about the data of a task, and write its first test images beside the report."""
    tables = {split: open_table(f"{task.data}/{split}") for split in ("train", "validation", "test")}
    test = tables["test"]
    (directory / "examples").mkdir(exist_ok=True)
    examples = []
    for row in range(EXAMPLES):
        file = directory / "examples" / f"{task.name}_{row}.png"
        image, label, _ = test.row(row)
        file.write_bytes(image)
        examples.append({"png": str(file.relative_to(directory)), "label": test.classes[label]})
    return {
        "classes": list(test.classes),
        "resolution": task.resolution,
        **{f"{split}_images": table.num_rows for split, table in tables.items()},
        "licence": LICENCES[task.name],
        "examples": examples,
    }


def _environment() -> dict[str, Any]:
    """Return versions, cores and commit: what the numbers depend on."""
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=SPECS, capture_output=True, text=True, check=False
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "cores": os.cpu_count(),
        "device": "cpu",
        "commit": git.stdout.strip() or None,
    }
