"""The steps after the choice: train the setting on train and validation tables together, and read the test tables."""

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from multitask.run.directory import Run, Version, evaluate_models, write_json
from multitask.run.files import checked, read_json
from multitask.run.tracking import Tracker
from multitask.run.trainer import Stopped, Trial, resume, train
from multitask.server.messages import mean_top1
from multitask.spec.schema import JobSpec
from multitask.sweep.outcomes import Choice, winning_spec

TEST = "test.json"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result on the test tables, which a sweep reads only once."""

    trial: int
    """Number of the chosen trial."""
    directory: str
    """Directory of the run whose models were measured."""
    version: Version
    """Version of that run: `best` by validation, or `last` if validation images were trained on."""
    tasks: dict[str, dict[str, float]]
    """Task -> top1 and top5 in percent, loss."""

    @property
    def top1(self) -> float:
        """Mean top-1 of the tasks in percent."""
        return mean_top1(self.tasks.values())


def stopped(directory: Path, exit_status: int = Stopped.exit_status) -> Stopped:
    """Return the exception that says that a sweep was interrupted, and how to continue it."""
    stop = Stopped(
        f"Stopped. Continue with the same command and --resume (in Python go_on=True); everything is in {directory}"
    )
    stop.exit_status = exit_status
    return stop


def run_to_its_end(spec: JobSpec, tracker: Tracker, console: Console) -> Run:
    """Start a training beside the trials, continue it, or find that it has finished.

    Its MLflow run lies below that of the sweep.

    Raises:
        Stopped: Ctrl-C.
    """
    directory, nested = spec.run_directory, Trial(parent_run_id=tracker.run_id)
    if (directory / "result.json").is_file():
        return Run(directory)
    try:
        if (directory / "spec.yaml").is_file():
            return resume(directory, console=console, trial=nested)
        return train(spec, console=console, trial=nested)
    except Stopped as stop:
        raise stopped(directory.parent, stop.exit_status) from None


def retrained_spec(choice: Choice, sweep: str, directory: Path) -> JobSpec:
    """Return the chosen job with train and validation tables together, as many steps, and an evaluation at its end."""
    # The folder has the trial's number: a resumed sweep may choose another trial, and must not continue this run.
    spec = winning_spec(choice, sweep, directory, f"retrained_{choice.trial.number:04d}")
    tasks = tuple(replace(task, train_on="train+validation") for task in spec.tasks)
    return replace(spec, tasks=tasks, evaluate_every=spec.steps)


def measure(directory: Path, choice: Choice, retrained: Run | None) -> Verdict:
    """Evaluate the retrained models, or else those of the chosen trial, on the test tables, and write the result.

    Args:
        directory: directory of the sweep.
        retrained: the run on train and validation tables, or None if the spec asks for none.
    """
    version: Version = "best" if retrained is None else "last"
    run = Run(choice.trial.directory) if retrained is None else retrained
    _, models = run.models(version)
    tasks = evaluate_models(models, run.spec, "test")
    verdict = Verdict(trial=choice.trial.number, directory=str(run.directory), version=version, tasks=tasks)
    write_json(directory / TEST, vars(verdict))
    return verdict


def read_verdict(directory: Path) -> Verdict | None:
    """Return the result on the test tables that a sweep has written, or None if it has not read them.

    Raises:
        RunError: the file is damaged.
    """
    path = directory / TEST
    if not path.exists():
        return None
    remedy = "Restore it from a copy. Without this file, the sweep reads the test tables again when it goes on."
    return checked(Verdict, read_json(path, remedy), path, remedy)
