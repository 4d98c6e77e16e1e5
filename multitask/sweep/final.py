"""What comes after the choice: the setting trained on all that is not test, and one look at the test tables."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from multitask.run.directory import Run, Version, evaluate_models, write_json
from multitask.run.tracking import Tracker
from multitask.run.trainer import Stopped, Trial, resume, train
from multitask.server.messages import mean_top1
from multitask.spec.schema import JobSpec
from multitask.sweep.outcomes import Choice, winning_spec

TEST = "test.json"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the test tables said, once."""

    trial: int
    """The chosen trial."""
    directory: str
    """Of the run whose models were measured."""
    version: Version
    """Of that run: `best` by validation, or the `last` where validation images were trained on."""
    tasks: dict[str, dict[str, float]]
    """Task -> top1 and top5 in percent, loss."""

    @property
    def top1(self) -> float:
        """Percent, mean over tasks."""
        return mean_top1(self.tasks.values())


def stopped(directory: Path) -> Stopped:
    """A sweep's way to say that it was interrupted, and how to go on with it."""
    return Stopped(f"Stopped. Go on with the same command and --resume; everything is in {directory}")


def run_to_its_end(spec: JobSpec, tracker: Tracker, console: Console) -> Run:
    """A training beside the trials, below the sweep's run in MLflow; begun, gone on with, or found done.

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
    except Stopped:
        raise stopped(directory.parent) from None


def retrained_spec(choice: Choice, sweep: str, directory: Path) -> JobSpec:
    """The chosen job on train and validation tables together, at its steps; evaluated at its end alone."""
    # Another choice, as after a trial that failed and was tried again, has another folder.
    spec = winning_spec(choice, sweep, directory, f"retrained_{choice.trial.number:04d}")
    tasks = tuple(replace(task, train_on="train+validation") for task in spec.tasks)
    return replace(spec, tasks=tasks, evaluate_every=spec.steps)


def measure(directory: Path, choice: Choice, retrained: Run | None) -> Verdict:
    """Read the test tables with the retrained models, or else the chosen trial's, and note what they say.

    Args:
        directory: of the sweep.
    """
    version: Version = "best" if retrained is None else "last"
    run = Run(choice.trial.directory) if retrained is None else retrained
    _, models = run.models(version)
    tasks = evaluate_models(models, run.spec, "test")
    verdict = Verdict(trial=choice.trial.number, directory=str(run.directory), version=version, tasks=tasks)
    write_json(directory / TEST, vars(verdict))
    return verdict


def read_verdict(directory: Path) -> Verdict | None:
    """What the test tables have said to a sweep; None if it has not asked."""
    path = directory / TEST
    return Verdict(**json.loads(path.read_text())) if path.is_file() else None
