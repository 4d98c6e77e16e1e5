"""The `multitask` command: one verb per job. Each reads its input, calls one function and shows the result."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from jobs.cascade_verbs import app as cascade_app
from jobs.cluster_verbs import jobs_app, read_status_there, submit
from jobs.data_verbs import app as data_app
from jobs.plan_verbs import plan
from jobs.sweep_verbs import sweep
from multitask.startup import put_off_torch_compile

app = typer.Typer(
    help="Train many vision tasks on one shared backbone, and ship one backbone with a small patch per task.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
bundle_app = typer.Typer(help="Look at, check and fold patch bundles.", no_args_is_help=True)
app.add_typer(bundle_app, name="bundle")
app.add_typer(data_app, name="data")
app.add_typer(cascade_app, name="cascade")
app.command()(sweep)
app.add_typer(jobs_app, name="jobs")
# What `submit` does not know belongs to the verb that it submits.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(submit)
app.command()(plan)

AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]
RunDirectory = Annotated[Path, typer.Argument(help="A directory that `multitask train` wrote.")]
Bundle = Annotated[Path, typer.Argument(help="A .patch file.")]
Weights = Annotated[
    Path, typer.Option("--backbone", help="The backbone.safetensors that the bundle was exported with.")
]


def main() -> None:
    """Entry point: errors become one message and exit status 1; `--debug` shows the traceback instead."""
    put_off_torch_compile()
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        app([argument for argument in arguments if argument != "--debug"])
    except Exception as error:
        if debug:
            raise
        print(f"error: {error}\n(--debug shows the traceback)", file=sys.stderr)
        sys.exit(1)


@app.command()
def demo(
    directory: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    steps: Annotated[int | None, typer.Option(min=1, help="Steps per task, fewer for a quick look.")] = None,
) -> None:
    """Train three real tasks three ways, export and check the patches, fit a cascade, write a report."""
    from jobs.demo.run import run_demo

    run_demo(directory, steps)


@app.command()
def train(
    spec: Annotated[Path | None, typer.Argument(help="A job spec (YAML).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with a run that stopped.")] = None,
    attach: Annotated[Path | None, typer.Option(metavar="RUN", help="Add --task FILE to a running job.")] = None,
    remove: Annotated[Path | None, typer.Option(metavar="RUN", help="Take --task NAME out of a running job.")] = None,
    task: Annotated[
        str | None, typer.Option(help="For --attach a YAML file with one task, for --remove a name.")
    ] = None,
    json_output: AsJson = False,
) -> None:
    """Run a training job, go on with one, or change the tasks of one that runs."""
    import multitask
    from multitask.run.live import ask
    from multitask.spec.reading import load_task

    if sum(choice is not None for choice in (spec, resume, attach, remove)) != 1:
        raise ValueError("Name one of: a job spec, --resume RUN, --attach RUN --task FILE, --remove RUN --task NAME.")
    if (task is None) != (attach is None and remove is None):
        raise ValueError("--task goes with --attach (a YAML file) or --remove (a task's name), and they with it.")
    if attach is not None and task is not None:
        ask(attach, attach=load_task(Path(task)))
        print(f"The run in {attach} has taken up the task of {task}.")
        return
    if remove is not None:
        ask(remove, remove=task)
        print(f"The run in {remove} goes on without task {task}; its tensors are in {remove}/removed.")
        return
    try:
        run = multitask.resume(resume) if resume is not None else multitask.train(spec, overwrite=overwrite)  # type: ignore[arg-type]
    except multitask.Stopped as stop:
        print(stop, file=sys.stderr)
        raise typer.Exit(130) from None
    if json_output:
        print(json.dumps(run.result))
        return
    _show_metrics(f"Validation of the best version ({run.result['best']['version']})", run.result["best"]["tasks"])
    print(f"{run.directory}\nNext: multitask export {run.directory}")


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="The directory of a run, running or not.")],
    address: Annotated[
        str | None, typer.Option(help="Look there: a cluster's dashboard, such as http://127.0.0.1:8265.")
    ] = None,
    json_output: AsJson = False,
) -> None:
    """Show how a run stands: state, steps, losses, speed, staleness and faults of each task."""
    from multitask.run.live import read_status

    found = read_status(run) if address is None else read_status_there(run, address)
    if json_output:
        print(json.dumps(found))
        return
    print(f"{found['name']}: {found['state']}, engine {found['engine']}, last heard of {found['silent_s']:.0f} s ago")
    if found["error"]:
        print(found["error"])
    if found.get("rejected_calls"):
        print(f"turned away: {found['rejected_calls']} pushes and joins of unknown workers or replaced processes")
    counts = ("redone", "lost", "rejected", "skipped")
    table = Table("task", "steps", "loss", "rate", "images/s", "staleness", *counts)
    for name, task in found["tasks"].items():
        latest = task["latest"]
        numbers = [f"{latest[key]:.4g}" if latest else "" for key in ("loss", "rate", "samples_per_s", "staleness")]
        table.add_row(name, f"{task['made']}/{task['steps']}", *numbers, *(str(task[count]) for count in counts))
    Console().print(table)


@app.command()
def export(
    run: RunDirectory,
    to: Annotated[Path | None, typer.Option(help="Folder for the files; RUN/export by default.")] = None,
    version: Annotated[Literal["best", "last"], typer.Option(help="By validation, or the end.")] = "best",
    json_output: AsJson = False,
) -> None:
    """Write the backbone and one bundle per task, all from one version of a run."""
    from multitask.run.directory import Run

    exported = Run(run).export(version, to)
    sizes = {str(path): path.stat().st_size for path in (exported.backbone, *exported.bundles.values())}
    if json_output:
        print(json.dumps(sizes))
        return
    table = Table("file", "bytes", "of the backbone")
    for name, size in sizes.items():
        table.add_row(name, f"{size:,}", f"{size / exported.backbone.stat().st_size:.1%}")
    Console().print(table)


@app.command()
def gather(
    spec: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A job spec (YAML): its backbone, a ViT.")],
    task: Annotated[str, typer.Argument(help="The task whose training and validation images are wanted.")],
    folder: Annotated[Path, typer.Argument(file_okay=False, help="Gets train.arrow and validation.arrow.")],
    k: Annotated[int | None, typer.Option(min=0, help="Last map of the sum; the backbone's last by default.")] = None,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Of the maps.")] = "float32",
) -> None:
    """Write a task's images as the maps that MIST's edge learns from: `python -m patches.edge`."""
    from multitask.gather import gather
    from multitask.spec.reading import load_spec

    for split, maps in gather(load_spec(spec), task, folder, k=k, dtype=dtype).items():
        row_bytes = sum(layout.row_bytes for layout in maps.layouts.values())
        print(f"{split}: {len(maps):,} images of {row_bytes:,} bytes each in {maps.path}")


@app.command()
def evaluate(
    run: RunDirectory,
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="Which of the tables.")] = "test",
    task: Annotated[list[str] | None, typer.Option(help="Only this task; may be given several times.")] = None,
    save_predictions: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Gets logits, label and row of every image: a Parquet a task.")
    ] = None,
    json_output: AsJson = False,
) -> None:
    """Evaluate a run's exported bundles on one of their tasks' tables."""
    from multitask.run.directory import Run, RunError, evaluate_models, open_export
    from patches import unknown_name_message

    opened = Run(run)
    _, models = open_export(run / "export")
    for name in task or []:
        if name not in models:
            raise RunError(unknown_name_message("task", name, models))
    models = {name: model for name, model in models.items() if not task or name in task}
    metrics = evaluate_models(models, opened.spec, split, save_predictions)
    if json_output:
        print(json.dumps(metrics))
    else:
        _show_metrics(f"{split} of {run / 'export'}", metrics)


@bundle_app.command()
def inspect(bundle: Bundle, json_output: AsJson = False) -> None:
    """Show what a bundle says of itself; no model is built."""
    import patches

    described = _plain(patches.inspect_bundle(bundle))
    if json_output:
        print(json.dumps(described))
        return
    table = Table(show_header=False)
    for key, value in described.items():
        table.add_row(key, json.dumps(value) if not isinstance(value, str) else value)
    Console().print(table)


@bundle_app.command()
def verify(bundle: Bundle, backbone: Weights) -> None:
    """Check a bundle's own hash, and that it fits the backbone; exit status 1 when it does not."""
    import patches

    patches.verify_bundle(bundle, _backbone_of(bundle, backbone))
    print(f"{bundle} is whole and fits {backbone}")


@bundle_app.command()
def fold(
    bundle: Bundle,
    backbone: Weights,
    to: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Fold a bundle into a plain network with the same outputs and write its state dict."""
    import safetensors.torch

    import patches
    from patches.files import write_atomic

    plain = patches.fold(patches.load_bundle(bundle, _backbone_of(bundle, backbone)))
    write_atomic(to, safetensors.torch.save(plain.state_dict()))
    print(f"{to}: state dict of the folded {type(plain).__name__}, {to.stat().st_size:,} bytes")


def _backbone_of(bundle: Path, weights: Path) -> Any:
    import patches

    architecture = patches.inspect_bundle(bundle).backbone
    return patches.load_backbone(architecture["name"], weights, **architecture["options"])


def _show_metrics(title: str, metrics: dict[str, dict[str, float]]) -> None:
    table = Table("task", "top-1 %", "top-5 %", "loss", title=title)
    for task, values in metrics.items():
        table.add_row(task, f"{values['top1']:.2f}", f"{values['top5']:.2f}", f"{values['loss']:.4f}")
    Console().print(table)


def _plain(report: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(report)


if __name__ == "__main__":
    main()
