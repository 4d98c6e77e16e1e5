"""The demo: three real tasks on one backbone, trained three ways, exported, and checked in a fresh process; and one of
them at four resolutions, as a cascade.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console

import multitask
import patches
from multitask.cascade import Check, check
from multitask.cascade.figures import headline, section, stage_sheet
from multitask.cascade.from_run import cascade_from_run
from multitask.cluster.session import ray_session
from multitask.data import TrainBatches, open_table
from multitask.evaluation import reestimate_statistics, torch_threads
from multitask.report.report import accuracy_table, write_report
from multitask.run.directory import Export, Run, evaluate_models, write_json
from multitask.spec.reading import load_spec
from multitask.spec.schema import TaskSpec

SPECS = Path(__file__).parent / "specs"
MODES = {
    "private_scale_bias": ("demo.yaml", "private scale-and-bias + last layer"),
    "private_last_layer": ("demo_last_layer.yaml", "private last layer, all else shared"),
    "independent": ("demo_independent.yaml", "three independent models"),
}
RESOLUTIONS = ("demo_resolutions.yaml", "one data set at four resolutions, private scale-and-bias")
OPERATING_POINTS = 9
SLACK = 0.001
"""The resolutions differ by tenths of a point after so few steps; beating the best by more is often beyond them."""
REESTIMATED = "private_last_layer_reestimated"
REESTIMATION_BATCHES = 100
EXAMPLES = 10
LICENCES = {
    "fashion": "Fashion-MNIST, Copyright 2017 Zalando SE, MIT",
    "animals": "Animal-MNIST, Sina Mohammadi, MIT",
    "digits": "MNIST (Y. LeCun, C. Cortes, C. Burges), CC BY-SA 3.0",
}


def run_demo(directory: Path, steps: int | None = None) -> Path:
    """Train, export, re-evaluate in a fresh process, fit a cascade, and write results.json, report.html and the plots.

    Args:
        directory: where everything goes; runs of an earlier demo in it are replaced.
        steps: steps per task; the specs' by default.
    Returns:
        The report's path.
    """
    console = Console()
    start = time.perf_counter()
    # Absolute: the fresh process and the bundles' readers may stand elsewhere.
    directory = directory.resolve()
    runs = {}
    with ray_session():
        for mode, (file, title) in {**MODES, "resolutions": RESOLUTIONS}.items():
            console.print(f"[bold]{title}[/bold]")
            overrides = {"directory": str(directory / mode)} | ({"steps": steps} if steps else {})
            runs[mode] = multitask.train(load_spec(SPECS / file, overrides), overwrite=True, console=console)
    resolutions = runs.pop("resolutions")
    console.print("exporting, and reading the test tables")
    exports = {mode: run.export() for mode, run in runs.items()}
    modes = {mode: _mode(MODES[mode][1], run, exports[mode]) for mode, run in runs.items()}
    modes = _insert_after(
        modes, "private_last_layer", REESTIMATED, _reestimated(runs["private_last_layer"], directory / REESTIMATED)
    )
    package = directory / "fashion.cascade"
    checked, sheet = _cascade(resolutions, package)
    run, export = runs["private_scale_bias"], exports["private_scale_bias"]
    fresh = _evaluate_in_a_fresh_process(run)
    results = {
        "title": "Three tasks, one backbone",
        "seconds": time.perf_counter() - start,
        "seed": run.spec.seed,
        "environment": _environment(),
        "tasks": {task.name: _task(task, directory) for task in run.spec.tasks},
        "modes": modes,
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
    console.print(accuracy_table(results))
    console.print(headline(checked))
    console.print(
        f"backbone and bundles: {export.backbone.parent}\n"
        f"cascade:              {package}\n"
        f"numbers:              {directory / 'results.json'}\n"
        f"MLflow:               mlflow ui --backend-store-uri sqlite:///{directory / 'mlflow.db'}\n"
        f"report:               {report}",
        soft_wrap=True,
    )
    return report


def _mode(title: str, run: Run, export: Export) -> dict[str, Any]:
    """One row of the comparison: the best version on the test tables, what it weighs, and how it was trained."""
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
    # Independent models need no shared file: their bundles hold whole networks.
    files = [*export.bundles.values()] + ([] if run.spec.tasks[0].method == "full" else [export.backbone])
    return {
        "title": title,
        "parameters": run.result["parameters"],
        "bytes": sum(file.stat().st_size for file in files),
        "seconds": run.result["seconds"],
        "tasks": tasks,
    }


def _reestimated(run: Run, folder: Path) -> dict[str, Any]:
    """The fair baseline: the last-layer run's weights, with each task's running statistics measured on its own data."""
    backbone, baseline = run.models("best")
    models = {}
    folder.mkdir(parents=True, exist_ok=True)
    backbone.save(folder / "backbone.safetensors")
    files = [folder / "backbone.safetensors"]
    for task in run.spec.tasks:
        model = patches.attach(backbone, "norm_statistics+last_layer", task.num_classes)
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
        patches.save_bundle(
            model, files[-1], classes=list(table.classes), preprocessing={"resolution": task.resolution}
        )
    return {
        "title": "private last layer, statistics re-estimated per task",
        "parameters": run.result["parameters"],
        "bytes": sum(file.stat().st_size for file in files),
        "tasks": evaluate_models(models, run.spec, "test"),
    }


def _cascade(run: Run, to: Path) -> tuple[Check, bytes]:
    """A cascade over a run's resolutions, measured on the test images, and examples of what stops at each stage."""
    cascade, test = cascade_from_run(run, to, operating_points=OPERATING_POINTS, slack=SLACK)
    table = open_table(f"{run.spec.tasks[0].data}/test", verify=False)
    return check(cascade, test), stage_sheet(table, test, cascade.point())


def _evaluate_in_a_fresh_process(run: Run) -> dict[str, dict[str, float]]:
    """Backbone and bundles loaded by another process, which holds nothing of this one."""
    command = [sys.executable, "-m", "jobs.cli", "evaluate", str(run.directory), "--json"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"The fresh process that loads the bundles failed:\n{finished.stderr}")
    return json.loads(finished.stdout)


def _task(task: TaskSpec, directory: Path) -> dict[str, Any]:
    """What the report says of a task's data, with the first test images as files beside it."""
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


def _insert_after(modes: Mapping[str, Any], before: str, name: str, mode: Any) -> dict[str, Any]:
    """The order of the rows: each baseline beside its fair variant."""
    rows: dict[str, Any] = {}
    for key, value in modes.items():
        rows[key] = value
        if key == before:
            rows[name] = mode
    return rows
