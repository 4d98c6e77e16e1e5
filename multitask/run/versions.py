"""The versions that a run keeps, the best and the last one, and the decision to end it when the best gets no better."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from multitask.job import Job
from multitask.job.writing import keep_trying
from multitask.run.directory import RunError, read_about, write_version
from multitask.server.messages import Evaluation, mean_top1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EarlyStop:
    """Where a run ended because of `stop_after`."""

    version: int
    """The run's last version, whatever its engine did before it heard of the end."""
    round: int
    best_version: int
    best_round: int
    evaluations: int
    """Number of evaluations since the best version, none of which was better."""


def early_stop(job: Job, evaluation: Evaluation, best: Mapping[str, Any]) -> EarlyStop | None:
    """Decide whether a run ends at an evaluation that is not the best one.

    The decision depends on rounds and on the best version's file alone, so a run that was resumed makes the same one.

    Args:
        best: what the file of the best version says about it.
    Returns:
        None if training goes on, or has made its last step with this version.
    """
    spec = job.spec
    assert spec.evaluate_every is not None
    evaluations = evaluation.round // spec.evaluate_every - best["round"] // spec.evaluate_every
    last_round = job.steps + max(job.progress.first_round.values(), default=0)
    if spec.stop_after is None or evaluations < spec.stop_after or evaluation.round >= last_round:
        return None
    return EarlyStop(evaluation.version, evaluation.round, best["version"], best["round"], evaluations)


class Versions:
    """The files `best.safetensors` and `last.safetensors` of a run."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def keep_if_best(self, job: Job, evaluation: Evaluation) -> bool:
        """Write an evaluated version if it is better than the best version on disk, and return whether it is.

        The first evaluation counts as the best, and so does the first one after the job's tasks changed. The file
        decides, and not the server, because a server that went back to a checkpoint does not know the evaluations after
        that checkpoint.
        """
        best = self.best()
        tasks = {} if best is None else best["tasks"]
        is_best = tasks.keys() != evaluation.metrics.keys() or evaluation.mean_top1 > mean_top1(tasks.values())
        if is_best:
            self.write(job, "best", evaluation)
        return is_best

    def best(self) -> dict[str, Any] | None:
        """Return version, round and metrics (`tasks`) of the best version, or None if there is none to be read."""
        path = self._directory / "best.safetensors"
        if not path.exists():
            return None
        try:
            return read_about(path)
        except RunError as error:
            log.warning("The best version is chosen anew, because the one before cannot be read: %s", error)
            return None

    def write(self, job: Job, name: Literal["best", "last"], version: Evaluation) -> None:
        """Write a version's tensors and metrics.

        Raises:
            TrainingError: the file could not be written for a minute.
        """
        about = {"version": version.version, "round": version.round, "tasks": version.metrics}
        path, tensors = self._directory / f"{name}.safetensors", job.state(version.groups)
        keep_trying(f"'{path}'", lambda: write_version(path, *tensors, about))
