"""The run directory: its files, and the models and bundles that are made from them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

import patches
from multitask.data import Batch
from multitask.data.predictions import predictions_writer
from multitask.errors import RunError
from multitask.evaluation import evaluate, torch_threads
from multitask.job.models import attach_task, load_backbone
from multitask.job.tables import open_split, table_batches
from multitask.run.files import (
    RESULT_REMEDY,
    VERSION_REMEDY,
    RunResult,
    VersionFacts,
    checked,
    damaged,
    read_json,
)
from multitask.run.paths import check_data, moved
from multitask.run.tasks import read_tasks, record_of
from multitask.spec.errors import SpecError
from multitask.spec.reading import dump_yaml, load_spec
from multitask.spec.schema import JobSpec, TaskSpec
from patches.files import write_atomic
from patches.quoting import shortened

Version = Literal["best", "last"]


@dataclass(frozen=True)
class Export:
    """One backbone file and one bundle per task, all from one version of a run."""

    backbone: Path
    bundles: dict[str, Path]


class Run:
    """The directory of a finished run.

    It holds spec.yaml, tasks.json, best.safetensors, last.safetensors and result.json, and export/ after an export.
    """

    def __init__(self, directory: Path) -> None:
        """Open the directory of a finished run.

        Raises:
            RunError: the directory has no finished run, or its result or its spec is damaged.
        """
        self.directory = directory
        path = directory / "result.json"
        if not path.exists():
            raise RunError(
                f"'{directory}' holds no finished run (no result.json). Name a directory that `multitask train` wrote."
            )
        self.spec = moved(read_spec(directory / "spec.yaml"), directory.resolve())
        """The run's spec. Where the run was moved together with its data, it has the paths of today."""
        self.result: dict[str, Any] = read_json(path, RESULT_REMEDY)
        checked(RunResult, self.result, path, RESULT_REMEDY)
        self._tasks = read_tasks(directory)

    def models(self, version: Version = "best") -> tuple[patches.Backbone, dict[str, patches.PatchedModel]]:
        """Load the backbone of one version of the run, and every task's model on it.

        Returns:
            The backbone, and task -> its model in eval mode, with the class list that the task began with.
        Raises:
            RunError: the file of that version is missing or damaged, or does not fit the run's spec.
        """
        path = self.directory / f"{version}.safetensors"
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise damaged(path, error, VERSION_REMEDY) from error
        backbone = load_backbone(self.spec, weights=None)
        models = {task.name: attach_task(backbone, task, self.spec).eval() for task in self.spec.tasks}
        try:
            backbone.network.load_state_dict(_below("backbone/", tensors))
            for name, model in models.items():
                model.load_private_state(_below(f"tasks/{name}/", tensors))
        except (RuntimeError, patches.PatchError) as error:  # tensors are missing or have other shapes
            raise damaged(path, f"its tensors do not fit spec.yaml ({error})", VERSION_REMEDY) from error
        for name in models.keys() & self._tasks.keys():
            models[name].classes = self._tasks[name].classes
        return backbone, models

    def export(self, version: Version = "best", to: Path | None = None) -> Export:
        """Write backbone.safetensors and one bundle per task, all from one version.

        No table is read: the class lists are those that the tasks began with. Only for a run of version 0.1 are they
        read from the training tables.

        Args:
            version: "best" (by validation) or "last".
            to: folder for the files; export/ in the run directory by default.
        """
        records = {task.name: record_of(task, self._tasks) for task in self.spec.tasks}
        folder = to or self.directory / "export"
        folder.mkdir(parents=True, exist_ok=True)
        backbone, models = self.models(version)
        export = Export(folder / "backbone.safetensors", {name: folder / f"{name}.patch" for name in models})
        backbone.save(export.backbone)
        for name, record in records.items():
            patches.save_bundle(
                models[name],
                export.bundles[name],
                classes=record.classes,
                preprocessing=record.preprocessing,
                metrics={f"validation_{key}": value for key, value in self.result[version]["tasks"][name].items()},
            )
        return export


def open_export(folder: Path) -> tuple[patches.Backbone, dict[str, patches.PatchedModel]]:
    """Load an exported backbone and all bundles in the same folder.

    Raises:
        RunError: the folder has no bundles or no backbone.
        patches.BundleError: a bundle does not fit the backbone, or is damaged.
    """
    paths = sorted(folder.glob("*.patch"))
    if not paths or not (folder / "backbone.safetensors").is_file():
        raise RunError(f"'{folder}' does not hold a backbone.safetensors and bundles. Run `multitask export RUN`.")
    architecture = patches.inspect_bundle(paths[0]).backbone
    weights = folder / "backbone.safetensors"
    backbone = patches.load_backbone(architecture["name"], weights, **architecture["options"])
    return backbone, {path.stem: patches.load_bundle(path, backbone) for path in paths}


def evaluate_models(
    models: Mapping[str, patches.PatchedModel], spec: JobSpec, split: str, save_to: Path | None = None
) -> dict[str, dict[str, float]]:
    """Evaluate models on a whole table of their tasks' data.

    Classes are matched by name: a table may have them in another order than the model, and may lack some of them.

    Args:
        models: task -> its model. Tasks of the job without a model are left out.
        split: "train", "validation" or "test".
        save_to: folder for each task's predictions, in the format of `multitask.cascade.read_predictions`. The row of
            an image is its number in the table.
    Returns:
        Task -> top1 and top5 (percent) and loss.
    Raises:
        RunError: the folder of a task's data does not exist.
        DataError: a table cannot be read, or has a class that the model does not know.
    """
    tasks = [task for task in spec.tasks if task.name in models]
    check_data(spec, tasks)
    with torch_threads(spec.resources.threads_per_worker):
        return {task.name: _evaluate_task(models[task.name], task, split, save_to) for task in tasks}


def _evaluate_task(model: patches.PatchedModel, task: TaskSpec, split: str, save_to: Path | None) -> dict[str, float]:
    # A model of a run of version 0.1 does not know its classes. They are those of its training table.
    classes = model.classes or open_split(task, "train", verify=False).classes
    batches = table_batches(open_split(task, split).in_classes(classes), task)
    if save_to is None:
        return evaluate(model, batches)
    with predictions_writer(save_to / f"{task.name}.parquet", model.num_classes, classes) as add:

        def keep(batch: Batch, logits: Tensor) -> None:
            assert batch.rows is not None
            add(batch.rows, batch.labels.numpy(), logits.float().cpu().numpy())

        return evaluate(model, batches, keep=keep)


def write_version(
    path: Path, backbone: Mapping[str, Tensor], tasks: Mapping[str, Mapping[str, Tensor]], about: Mapping[str, Any]
) -> None:
    """Write all tensors of one version to one safetensors file, completely or not at all.

    Args:
        backbone: the backbone's tensors by name.
        tasks: task -> its private tensors by name.
        about: version, round and the metrics of the tasks, which `read_about` returns.
    """
    tensors = {f"backbone/{name}": tensor for name, tensor in backbone.items()}
    for task, private in tasks.items():
        tensors |= {f"tasks/{task}/{name}": tensor for name, tensor in private.items()}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(contiguous, {"about": json.dumps(about)}))


def read_about(path: Path) -> dict[str, Any]:
    """Return the version, the round and the metrics (`tasks`) of a file that `write_version` wrote.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})["about"])
    except (OSError, SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise damaged(path, repr(error), VERSION_REMEDY) from error
    checked(VersionFacts, about, path, VERSION_REMEDY)
    return about


def write_spec(path: Path, spec: JobSpec) -> None:
    """Write a job spec as YAML, completely or not at all."""
    write_atomic(path, dump_yaml(spec).encode())


def read_spec(path: Path) -> JobSpec:
    """Read the job spec that a run has written.

    Raises:
        RunError: the file is damaged.
    """
    try:
        return load_spec(path)
    except SpecError as error:
        raise RunError(
            f"The run's spec cannot be read: {shortened(error, 600)} Give '{path}' the content with which the run "
            "began: its MLflow run keeps it as spec.yaml."
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Write plain data as JSON, completely or not at all."""
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, under their names without the prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
