"""What every engine gets and gives back."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from multitask.job.checkpoint import CheckpointStore
from multitask.job.job import Job
from multitask.server.messages import Evaluation, StepRecord, whole
from multitask.server.parameter_server import CompleteSnapshot
from multitask.server.progress import Progress
from multitask.worker import Values

log = logging.getLogger(__name__)

OnNews = Callable[[list[StepRecord], list[Evaluation], Progress], None]
"""Called now and then with what happened since the last call, and where the run stands."""


@dataclass(frozen=True)
class Driver:
    """Whom an engine tells and asks while it runs."""

    watch: OnNews
    store: CheckpointStore
    wants_pause: Callable[[], bool] = lambda: False
    """Asked now and then: stop all workers after their step, save a checkpoint, and return."""


@dataclass
class Outcome:
    """What an engine hands back when all workers have made their steps, or have paused."""

    versions: dict[str, Evaluation] = field(default_factory=dict)
    """The versions `last` and `best` of those evaluated here; `best` is missing if one before was better."""
    paused: bool = False
    """Workers stopped because `Driver.wants_pause` said so; a checkpoint has everything."""
    recoveries: list[float] = field(default_factory=list)
    """For each time that something was lost: seconds until it was back at work."""
    lost_at: dict[str, float] = field(default_factory=dict)
    """What is lost and not back yet -> since when, on the monotonic clock."""

    def lose(self, what: str) -> None:
        self.lost_at.setdefault(what, time.monotonic())

    def back(self, what: str) -> None:
        if what in self.lost_at:
            self.recoveries.append(time.monotonic() - self.lost_at.pop(what))


def take(
    job: Job,
    driver: Driver,
    outcome: Outcome,
    news: tuple[list[StepRecord], Mapping[int, CompleteSnapshot], Progress],
    kept: Callable[[int], Values | None],
) -> bool:
    """Tell the driver what the server gave out, and save the checkpoints that are complete.

    Args:
        news: what `ParameterServer.drain` returned.
        kept: from a version put aside to the values that the server keeps of it; None where it was lost since.
    Returns:
        All of it could be told: no version was lost with the server.
    """
    records, completed, progress = news
    evaluations, checkpoints = [], []
    complete_news = True
    for version, complete in sorted(completed.items()):
        values = kept(version)
        if values is None:
            complete_news = False
            continue
        groups = {name: whole(parts) for name, parts in values.items()}
        if complete.evaluation is not None:
            evaluations.append(replace(complete.evaluation, groups={**groups, **complete.evaluation.groups}))
        if complete.saved is not None:
            checkpoints.append(job.checkpoint(complete.progress, {**groups, **complete.saved}))
    for evaluation in evaluations:
        # A server that went back to a checkpoint knows no better one that came after it, and counts on from a version
        # before: workers hand in the oldest first, so the one told last is the last.
        best = outcome.versions.get("best")
        if evaluation.best and (best is None or evaluation.mean_top1 > best.mean_top1):
            outcome.versions["best"] = evaluation
        outcome.versions["last"] = evaluation
    driver.watch(records, evaluations, progress)
    # Last: a run that goes on from a checkpoint does not make again what lies before it.
    for checkpoint in checkpoints:
        if checkpoint.is_finite():
            driver.store.save(checkpoint)
            log.info("Saved a checkpoint of version %d.", checkpoint.progress.version)
        else:
            log.warning(
                "No checkpoint of version %d: it holds values that are not finite.", checkpoint.progress.version
            )
    return complete_news
