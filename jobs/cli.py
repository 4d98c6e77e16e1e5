"""The `multitask` command. Each verb reads its input, calls one function and shows the result."""

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from jobs.bundle_verbs import app as bundle_app
from jobs.cascade_verbs import app as cascade_app
from jobs.cluster_verbs import jobs_app, read_status_there, submit
from jobs.data_verbs import app as data_app
from jobs.groups import Group
from jobs.plan_verbs import plan
from jobs.predict_verbs import predict
from jobs.report_verbs import report, report_after_training
from jobs.sweep_verbs import sweep
from jobs.tables import show
from multitask.startup import RUN_PROCESS, put_off_torch_compile

if TYPE_CHECKING:
    from multitask import Run

VERBS = {
    "Train": ("demo", "data", "train", "resume", "attach", "remove", "status", "track"),
    "Judge and use": ("evaluate", "report", "export", "predict", "gather", "bundle", "cascade"),
    "Search and scale": ("sweep", "submit", "jobs", "plan"),
}
"""Heading in the help -> its verbs, in the order of work."""


class Verbs(Group):
    """The whole command, whose help shows the verbs under their headings."""

    def sections(self, ctx: Any) -> dict[str, list[str]]:  # noqa: ARG002
        return {heading: [verb for verb in verbs if verb in self.commands] for heading, verbs in VERBS.items()}

    def list_commands(self, ctx: Any) -> list[str]:
        return list(chain.from_iterable(self.sections(ctx).values()))


app = typer.Typer(
    cls=Verbs,
    help="Train many vision tasks on one shared backbone, and ship one backbone with a small patch per task.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's panels cut the names of options on a terminal of 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bundle_app, name="bundle")
app.add_typer(data_app, name="data")
app.add_typer(cascade_app, name="cascade")
app.command()(sweep)
app.add_typer(jobs_app, name="jobs")
# Options that `submit` does not know belong to the verb that it submits.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(submit)
app.command()(plan)
app.command()(report)
app.command()(predict)

AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]
RunDirectory = Annotated[Path, typer.Argument(help="A directory that `multitask train` wrote.")]
RunningRun = Annotated[Path, typer.Argument(help="The directory of a job that is running.")]


def main() -> None:
    """Run the command: an error becomes one message and exit status 1, or a traceback with `--debug`."""
    put_off_torch_compile()
    os.environ[RUN_PROCESS] = "1"  # for the processes that the command starts
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        app([argument for argument in arguments if argument != "--debug"], prog_name="multitask")
    except Exception as error:
        if debug:
            raise
        print(f"error: {error}\n(--debug shows the traceback)", file=sys.stderr)
        sys.exit(1)


def _print_version(asked: bool) -> None:
    if asked:
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "ray"))
        print(f"multitask {metadata.version('multitask-patches')} ({versions}, Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the versions in use.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show an error's traceback. This option may stand after any verb too.")
    ] = False,
) -> None:
    """Declare the options of the whole command. `main` takes `--debug` out before the command is parsed."""


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
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="The same as `multitask resume RUN`.")] = None,
    former: Annotated[list[str] | None, typer.Option("--attach", "--remove", "--task", hidden=True)] = None,
    json_output: AsJson = False,
) -> None:
    """Run a training job from its spec."""
    import multitask

    if former:
        raise ValueError(
            "Tasks are added to and removed from a running job by verbs of their own: `multitask attach RUN FILE` and "
            "`multitask remove RUN TASK`."
        )
    if (spec is None) == (resume is None) or (resume is not None and overwrite):
        raise ValueError(
            "`multitask train` needs either a job spec, with or without --overwrite, or --resume RUN, which continues "
            "a stopped run as `multitask resume RUN` does."
        )
    if resume is not None:
        _train(lambda: multitask.resume(resume), json_output)
    else:
        assert spec is not None
        _train(lambda: multitask.train(spec, overwrite=overwrite), json_output)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="The directory of a run that was stopped, or whose driver was lost.")],
    json_output: AsJson = False,
) -> None:
    """Continue a stopped run from its last checkpoint."""
    import multitask

    _train(lambda: multitask.resume(run), json_output)


def _train(start: "Callable[[], Run]", json_output: bool) -> None:
    """Train to the end, and show the result; or say how a stopped run goes on."""
    import multitask
    from multitask.run.tasks import read_tasks

    try:
        run = start()
    except multitask.Stopped as stop:
        print(stop, file=sys.stderr)
        raise typer.Exit(stop.exit_status) from None
    report_after_training(run.directory)
    if json_output:
        print(json.dumps(run.result))
        return
    best = run.result["best"]
    classes = {name: len(record.classes) for name, record in read_tasks(run.directory).items()}
    _show_metrics(f"Validation of the best version ({best['version']})", best["tasks"], classes)
    print(f"{run.directory}\nNext: multitask export {quote(str(run.directory))}")


@app.command()
def attach(
    run: RunningRun,
    file: Annotated[Path, typer.Argument(help="A YAML file with one task, which has the keys of a job spec's task.")],
) -> None:
    """Add a task to a running job."""
    from multitask.run.live import ask
    from multitask.spec.reading import load_task

    ask(run, attach=load_task(file))
    print(f"The run in {run} now trains the task in {file} too.")


@app.command()
def remove(run: RunningRun, task: Annotated[str, typer.Argument(help="The name of the task.")]) -> None:
    """Remove a task from a running job; its tensors are kept in RUN/removed."""
    from multitask.run.live import ask

    ask(run, remove=task)
    print(f"The run in {run} continues without task {task}; the task's tensors are in {run}/removed.")


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
    tasks = found["tasks"]
    counts = [name for name in ("redone", "lost", "rejected", "skipped") if any(task[name] for task in tasks.values())]
    table = Table("task", "steps", "loss", "rate", "images/s", "staleness", *counts)
    for name, task in tasks.items():
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
    table = Table("file", "bytes", "share of the backbone's size", title=str(exported.backbone.parent))
    for path, size in sizes.items():
        table.add_row(Path(path).name, f"{size:,}", f"{size / exported.backbone.stat().st_size:.1%}")
    show(table)
    task = " --task TASK" if len(exported.bundles) > 1 else ""
    print(f"Next: multitask predict {exported.backbone.parent} PHOTO...{task}")


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
    from multitask.progress import showing_rows
    from multitask.run.directory import Run, RunError, evaluate_models
    from patches import open_export, unknown_name_message

    opened = Run(run)
    models = open_export(run / "export").models
    for name in task or []:
        if name not in models:
            raise RunError(unknown_name_message("task", name, models))
    models = {name: model for name, model in models.items() if not task or name in task}
    with showing_rows(f"evaluating on {split}") as on_rows:
        metrics = evaluate_models(models, opened.spec, split, save_predictions, on_rows)
    if json_output:
        print(json.dumps(metrics))
    else:
        classes = {name: model.num_classes for name, model in models.items()}
        _show_metrics(f"{split} of {run / 'export'}", metrics, classes)


def _show_metrics(title: str, metrics: Mapping[str, Mapping[str, float]], classes: Mapping[str, int]) -> None:
    """Print a table of the tasks' metrics, with top-5 accuracy for tasks of more than five classes only.

    Args:
        metrics: task -> top1 and top5 in percent, loss.
        classes: task -> its number of classes.
    """
    top5 = {task: f"{values['top5']:.2f}" if classes[task] > 5 else "" for task, values in metrics.items()}
    shown = any(top5.values())
    table = Table("task", "top-1 %", *(["top-5 %"] if shown else []), "loss", title=title)
    for task, values in metrics.items():
        table.add_row(task, f"{values['top1']:.2f}", *([top5[task]] if shown else []), f"{values['loss']:.4f}")
    show(table)


if __name__ == "__main__":
    main()
