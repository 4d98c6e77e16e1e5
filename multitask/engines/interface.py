"""What every engine gets and gives back, and how a snapshot travels through a run.

**The way of a snapshot.** A snapshot belongs to one version of the server's values. It becomes an evaluation, a
checkpoint, or both. The order of events is the same under every engine:

1. The server requests it: every `evaluate_every` rounds, when a checkpoint is due, when all workers have made their
   last step, and when all workers have stopped for a pause. Each shard puts its values of this version aside.
2. Every reply to a worker carries the snapshot requests that the worker has not answered. A worker that gets a request
   for the first time copies its private tensors as they stand after its last push up to this version.
3. The worker reports its part. For a checkpoint, every worker reports its private tensors with the state of their
   optimiser, and the position of its training stream. For an evaluation, the first worker of each task fetches the
   snapshot's values from the server, computes the validation metrics and reports them with its private tensors.
   A worker that has made its last step gets no more replies, so it asks the server for its requests instead: when the
   engine tells it to, or, under `allreduce`, by itself until all ranks have made their last step.
4. The server completes the snapshot when the last part has arrived, and hands it out once, with the next `drain`.
5. The driver calls `take` with the answer. `take` fetches the values that the shards keep, puts the snapshot together,
   tells `Driver.watch` about evaluations, and then saves checkpoints.
6. The driver calls `drop_snapshot`, and the shards free the values, unless something more is requested of this version.

Under `allreduce` the ledger takes the place of the server and holds no values. Each rank puts the values of its groups
aside when it reads in the ledger that it has to. One rank of each group reports the group's values with its own part,
so `take` has nothing to fetch.

When the server is lost, its snapshots are lost with it, complete or not. The server goes back to a checkpoint, counts
on from there, and requests new snapshots. A report that was meant for the lost server is ignored, because a request
carries the incarnation of its server; a worker answers a request of the restored server for the same version anew. If a
complete snapshot was handed out, and its values are lost before the driver could fetch them, the driver passes over it.
Then `take` returns False, and the run does not end before the restored server has handed out its own last snapshot.
When only the answer to `drain` was lost, the driver asks again under the same number and gets the same answer.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from multitask.cluster.interface import Clock, Cluster
from multitask.cluster.ray_cluster import RayCluster
from multitask.job.checkpoint import CheckpointStore
from multitask.job.job import Job
from multitask.server.messages import Evaluation, StepRecord, whole
from multitask.server.parameter_server import CompleteSnapshot
from multitask.server.progress import Progress
from multitask.worker import Values

WHOLE_RUN = "all workers"
"""Name of all workers together among what is lost."""

log = logging.getLogger(__name__)

OnNews = Callable[[list[StepRecord], list[Evaluation], Progress], None]
"""Called again and again during a run, with what happened since the last call and where the run stands."""


@dataclass(frozen=True)
class Driver:
    """The driver as an engine sees it: what the engine reports to, and asks, while it runs."""

    watch: OnNews
    store: CheckpointStore
    wants_pause: Callable[[], bool] = lambda: False
    """Asked as often as `watch` is called. True lets all workers stop after their step; the engine then saves a
    checkpoint and returns."""
    cluster: Cluster = field(default_factory=RayCluster)
    """The cluster on which the engine starts processes; engine `local` uses its clock only."""


@dataclass
class Outcome:
    """What an engine hands back when all workers have made their steps, or have paused."""

    clock: Clock = time
    versions: dict[str, Evaluation] = field(default_factory=dict)
    """The evaluations `last` and `best` of this run of the engine; `best` is missing if an earlier one was better."""
    paused: bool = False
    """Workers stopped because `Driver.wants_pause` returned True; a checkpoint has everything."""
    recoveries: list[float] = field(default_factory=list)
    """For each loss, the seconds until what was lost was back at work."""
    lost_at: dict[str, float] = field(default_factory=dict)
    """What is lost and not back yet (a worker, the server, or WHOLE_RUN) -> when it was lost, in seconds on the
    monotonic clock."""

    def note_loss(self, what: str) -> None:
        """Note that something is lost now, unless it is lost already."""
        self.lost_at.setdefault(what, self.clock.monotonic())

    def note_recovery(self, what: str) -> None:
        """Note that something is back at work, if it was lost."""
        if what in self.lost_at:
            self.recoveries.append(self.clock.monotonic() - self.lost_at.pop(what))


def take(
    job: Job,
    driver: Driver,
    outcome: Outcome,
    news: tuple[list[StepRecord], Mapping[int, CompleteSnapshot], Progress],
    kept: Callable[[int], Values | None],
) -> bool:
    """Tell the driver what the server handed out, and save the checkpoints that are complete.

    Args:
        news: the result of `ParameterServer.drain`.
        kept: returns the values that the server keeps of a snapshot's version; None where they were lost with the
            server.
    Returns:
        False if values of a snapshot were lost with the server before the driver could fetch them.
    """
    records, completed, progress = news
    evaluations, checkpoints = [], []
    all_told = True
    for version, complete in sorted(completed.items()):
        values = kept(version)
        if values is None:
            all_told = False
            continue
        groups = {name: whole(parts) for name, parts in values.items()}
        if complete.evaluation is not None:
            evaluations.append(replace(complete.evaluation, groups={**groups, **complete.evaluation.groups}))
        if complete.saved is not None:
            checkpoints.append(job.checkpoint(complete.progress, {**groups, **complete.saved}))
    for evaluation in evaluations:
        # A server that went back to a checkpoint does not know the best evaluation since that checkpoint.
        best = outcome.versions.get("best")
        if evaluation.best and (best is None or evaluation.mean_top1 > best.mean_top1):
            outcome.versions["best"] = evaluation
        # Such a server counts on from an older version. Of one server's evaluations, an older version may come last: if
        # it is saved as well, it waits for the report of every worker.
        last = outcome.versions.get("last")
        if last is None or evaluation.server != last.server or evaluation.version > last.version:
            outcome.versions["last"] = evaluation
    driver.watch(records, evaluations, progress)
    # Checkpoints come last: a run that goes on from one does not tell again what happened before it.
    for checkpoint in checkpoints:
        if checkpoint.is_finite():
            driver.store.save(checkpoint)
            log.info("Saved a checkpoint of version %d.", checkpoint.progress.version)
        else:
            log.warning(
                "No checkpoint of version %d: it holds values that are not finite.", checkpoint.progress.version
            )
    return all_told
