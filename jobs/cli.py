"""The `multitask` command. Each verb reads its input, calls one function and shows the result."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from jobs.bundle_verbs import app as bundle_app
from jobs.cascade_verbs import app as cascade_app
from jobs.cluster_verbs import jobs_app, read_status_there, submit
from jobs.data_verbs import app as data_app
from jobs.plan_verbs import plan
from jobs.sweep_verbs import sweep
from jobs.tables import show
from multitask.startup import RUN_PROCESS, put_off_torch_compile

app = typer.Typer(
    help="Train many vision tasks on one shared backbone, and ship one backbone with a small patch per task.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(bundle_app, name="bundle")
app.add_typer(data_app, name="data")
app.add_typer(cascade_app, name="cascade")
app.command()(sweep)
app.add_typer(jobs_app, name="jobs")
# Options that `submit` does not know belong to the verb that it submits.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(submit)
app.command()(plan)

AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]
RunDirectory = Annotated[Path, typer.Argument(help="A directory that `multitask train` wrote.")]


def main() -> None:
    """Run the command: an error becomes one message and exit status 1, or a traceback with `--debug`."""
    put_off_torch_compile()
    os.environ[RUN_PROCESS] = "1"  # for the processes that the command starts
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
    directory: Annotated[Path, typer.Option(help="Folder for everything that the demo writes.")] = Path("runs/demo"),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of each task, instead of those of the job specs.")
    ] = None,
) -> None:
    """Train three real tasks in three ways, export and check the patches, fit a cascade, and write a report.

    At its start it says how long it takes.
    """
    from jobs.demo.run import run_demo

    run_demo(directory, steps)


@app.command()
def train(
    spec: Annotated[Path | None, typer.Argument(help="A job spec (YAML).")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the same directory.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Continue the stopped run in this directory.")
    ] = None,
    attach: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Add a task (--task FILE) to the running job in this directory.")
    ] = None,
    remove: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Remove a task (--task NAME) from the running job in this directory."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="With --attach: a YAML file with one task. With --remove: the name of a task.")
    ] = None,
    json_output: AsJson = False,
) -> None:
    """Run a training job, continue a stopped one, or change the tasks of a running one."""
    import multitask
    from multitask.run.live import ask
    from multitask.spec.reading import load_task

    if sum(choice is not None for choice in (spec, resume, attach, remove)) != 1:
        raise ValueError("Name one of: a job spec, --resume RUN, --attach RUN --task FILE, --remove RUN --task NAME.")
    if (task is None) != (attach is None and remove is None):
        raise ValueError("--attach needs --task FILE, --remove needs --task NAME, and --task needs one of the two.")
    if attach is not None and task is not None:
        ask(attach, attach=load_task(Path(task)))
        print(f"The run in {attach} now trains the task in {task} too.")
        return
    if remove is not None:
        ask(remove, remove=task)
        print(f"The run in {remove} continues without task {task}; the task's tensors are in {remove}/removed.")
        return
    try:
        run = multitask.resume(resume) if resume is not None else multitask.train(spec, overwrite=overwrite)  # type: ignore[arg-type]
    except multitask.Stopped as stop:
        print(stop, file=sys.stderr)
        raise typer.Exit(stop.exit_status) from None
    if json_output:
        print(json.dumps(run.result))
        return
    _show_metrics(f"Validation of the best version ({run.result['best']['version']})", run.result["best"]["tasks"])
    print(f"{run.directory}\nNext: multitask export {run.directory}")


@app.command()
def track(run: Annotated[Path, typer.Argument(help="The directory of a run that has ended or stopped.")]) -> None:
    """Send MLflow what it could not be told while the run was trained."""
    from multitask.run.trainer import track

    sent, run_id = track(run)
    print(
        f"MLflow has everything of the run in {run}: {sent} records were sent"
        + (f" to its run {run_id}" if sent else "")
    )


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="The directory of a run, which may have ended.")],
    address: Annotated[
        str | None,
        typer.Option(help="Look on a cluster: the address of its dashboard, such as http://127.0.0.1:8265."),
    ] = None,
    json_output: AsJson = False,
) -> None:
    """Show the state of a run: steps, loss, speed, staleness and faults of each task."""
    from multitask.run.live import read_status

    found = read_status(run) if address is None else read_status_there(run, address)
    if json_output:
        print(json.dumps(found))
        return
    print(
        f"{found['name']}: {found['state']}, engine {found['engine']}, last sign of life {found['silent_s']:.0f} s ago"
    )
    if found["error"]:
        print(found["error"])
    if found.get("rejected_calls"):
        print(f"rejected: {found['rejected_calls']} pushes and joins of unknown workers or replaced processes")
    counts = ("redone", "lost", "rejected", "skipped")
    table = Table("task", "steps", "loss", "rate", "images/s", "staleness", *counts)
    for name, task in found["tasks"].items():
        latest = task["latest"]
        numbers = [f"{latest[key]:.4g}" if latest else "" for key in ("loss", "rate", "samples_per_s", "staleness")]
        table.add_row(name, f"{task['made']}/{task['steps']}", *numbers, *(str(task[count]) for count in counts))
    show(table)


@app.command()
def export(
    run: RunDirectory,
    to: Annotated[Path | None, typer.Option(help="Folder for the files; RUN/export by default.")] = None,
    version: Annotated[
        Literal["best", "last"], typer.Option(help="The version that was best by validation, or the last one.")
    ] = "best",
    json_output: AsJson = False,
) -> None:
    """Write the backbone and one bundle for each task, all from one version of a run."""
    from multitask.run.directory import Run

    exported = Run(run).export(version, to)
    sizes = {str(path): path.stat().st_size for path in (exported.backbone, *exported.bundles.values())}
    if json_output:
        print(json.dumps(sizes))
        return
    table = Table("file", "bytes", "share of the backbone's size")
    for name, size in sizes.items():
        table.add_row(name, f"{size:,}", f"{size / exported.backbone.stat().st_size:.1%}")
    show(table)


@app.command()
def gather(
    spec: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A job spec (YAML) whose backbone is a ViT.")
    ],
    task: Annotated[str, typer.Argument(help="The task whose training and validation images are used.")],
    folder: Annotated[
        Path, typer.Argument(file_okay=False, help="Folder to write train.arrow and validation.arrow to.")
    ],
    k: Annotated[
        int | None,
        typer.Option(min=0, help="Index of the last block output that is summed; by default the backbone's last one."),
    ] = None,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Number format of the maps.")] = "float32",
) -> None:
    """Write a task's images as the feature maps from which `python -m patches.edge` trains MIST on an edge device."""
    from multitask.gather import gather
    from multitask.spec.reading import load_spec

    for split, maps in gather(load_spec(spec), task, folder, k=k, dtype=dtype).items():
        row_bytes = sum(layout.row_bytes for layout in maps.layouts.values())
        print(f"{split}: {len(maps):,} images of {row_bytes:,} bytes each in {maps.path}")


@app.command()
def evaluate(
    run: RunDirectory,
    split: Annotated[
        Literal["train", "validation", "test"], typer.Option(help="The table of each task to evaluate on.")
    ] = "test",
    task: Annotated[
        list[str] | None, typer.Option(help="Evaluate only this task; may be given several times. Default: all tasks.")
    ] = None,
    save_predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder to write one Parquet file for each task to, with logits, label and row of every image.",
        ),
    ] = None,
    json_output: AsJson = False,
) -> None:
    """Evaluate the exported bundles of a run on the train, validation or test tables of its tasks."""
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


def _show_metrics(title: str, metrics: dict[str, dict[str, float]]) -> None:
    table = Table("task", "top-1 %", "top-5 %", "loss", title=title)
    for task, values in metrics.items():
        table.add_row(task, f"{values['top1']:.2f}", f"{values['top5']:.2f}", f"{values['loss']:.4f}")
    show(table)


if __name__ == "__main__":
    main()
