"""Engine `allreduce`: a worker group of Ray Train whose workers sum their gradients among themselves.

Gradients meet as under `sync`, in one weighted mean per round, but no process collects them. Each worker is one rank.
It holds the values of all groups that its task uses, and applies every update itself. `multitask.engines.ranks` has the
code that runs inside the ranks.
"""

import contextlib
import itertools
import logging
from collections.abc import Collection, Iterator
from typing import Any

from ray.exceptions import GetTimeoutError, NodeDiedError, RayTaskError, WorkerCrashedError

from multitask.cluster.interface import Cluster, GroupStartError, Process, Ranks, Ref, Search
from multitask.cluster.places import check_places, demands
from multitask.engines.caller import POLL_S, PatientCaller
from multitask.engines.decisions import AfterTrain, LossCounter, MissingRanks, TrainResult, after_train, is_paused
from multitask.engines.interface import WHOLE_RUN, Driver, Outcome, take
from multitask.engines.ledger import GroupStatus, LedgerActor
from multitask.engines.loss import ENDED, LOST, NotBegunError, start_timeout
from multitask.engines.ranks import train_rank
from multitask.errors import TrainingError, failure
from multitask.job.checkpoint import CheckpointStore
from multitask.job.job import Job

TRAIN_START_S = 60.0
"""Seconds that Train's own processes and the ranks may take to start, in addition to the wait for places."""
END_S = 60.0
"""When a run ends: seconds to wait for Train to finish a start that is under way, and then as many again for Train to
end."""

CANCELS = 3
"""Number of times that Train is asked to end."""

log = logging.getLogger(__name__)


def run(job: Job, driver: Driver) -> Outcome:
    """Train in a worker group of Ray Train, on the Ray that this process is connected to or on one started here.

    When a rank is lost, Train starts the group again, and all ranks and the ledger go back to the latest checkpoint.

    Raises:
        PlacementError: the cluster has no room for all workers.
        TrainingError: a worker failed (with its name, task, steps and traceback), workers found no place in time, or
            processes are lost again and again without a step made.
    """
    cluster = driver.cluster
    outcome = Outcome(cluster.clock)
    with cluster.session():
        check_places(cluster, job.spec)
        with rank_group(cluster, job, driver.store) as ranks:
            AllreduceRun(job, driver, outcome, ranks).run()
    return outcome


class RankGroup:
    """The processes of a run: the ledger, and Ray Train with the ranks."""

    def __init__(self, cluster: Cluster, job: Job, store: CheckpointStore) -> None:
        self._cluster, self._job, self._store = cluster, job, store
        self.ledger = cluster.start(LedgerActor, [cluster], Process(place=Search.PARENT, restarts=True))
        self.start()

    def begin(self) -> Ref[None]:
        """Hand the ledger the job; the ledger restores the job at the latest checkpoint."""
        begun: Ref[None] = self.ledger.begin.remote(self._job, self._store)
        return begun

    def start(self) -> None:
        """Let the cluster start a group of ranks; `work` lasts until the ranks have ended their work."""
        resources = self._job.spec.resources
        nodes = list(self._cluster.nodes().values())
        demand = next(iter(demands(self._job.spec, nodes).values()))  # the spec allows no differences
        ranks = Ranks(
            number=len(self._job.workers),
            demand=demand,
            spread=resources.placement == "spread",
            start_timeout_s=resources.start_timeout_s,
            folder=self._job.spec.run_directory.resolve() / "train",
        )
        self.work = self._cluster.run_ranks(ranks, train_rank, self.ledger)

    def end(self) -> None:
        """End all processes and give their places back."""
        # While a group starts, a cancel has no effect, and the group's places would be left behind.
        clock = self._cluster.clock
        deadline = clock.monotonic() + END_S
        while self._is_starting() and not self.work.wait(0.0) and clock.monotonic() < deadline:
            clock.sleep(POLL_S)
        for _ in range(CANCELS):  # the next group may start at this moment
            self.work.cancel()
            if self.work.wait(END_S / CANCELS):
                break
        else:
            log.warning("Ray Train did not end within %g s, so its process is killed.", END_S)
            self.work.kill()
            self.work.wait(END_S)
        self.work.release()
        self._cluster.kill(self.ledger)

    def _is_starting(self) -> bool:
        try:
            starting: bool = self._cluster.get(self.ledger.starting.remote(), END_S)
        except (*LOST, GetTimeoutError):
            return True
        return starting


@contextlib.contextmanager
def rank_group(cluster: Cluster, job: Job, store: CheckpointStore) -> Iterator[RankGroup]:
    """Start the processes of a run, and end them with the block."""
    ranks = RankGroup(cluster, job, store)
    try:
        yield ranks
    finally:
        ranks.end()


class AllreduceRun:
    """Watches the ranks from the start of Train's first group to the end of the run."""

    def __init__(self, job: Job, driver: Driver, outcome: Outcome, ranks: RankGroup) -> None:
        self._job, self._driver, self._outcome, self._ranks = job, driver, outcome, ranks
        self._cluster = driver.cluster
        self._timeout_s = job.spec.resources.start_timeout_s
        self._caller = PatientCaller(
            self._cluster, "The ledger of the run", self._hand_out_job, self._on_lost_ledger, self._timeout_s
        )
        self._reports = itertools.count(1)
        self._pausing = False
        """Whether the ledger was told to let all ranks stop."""
        self._losses = LossCounter()
        self._records = 0
        """Number of step records that the driver was told."""
        self._missing = MissingRanks(tuple(job.workers), self._cluster.clock.monotonic())

    def run(self) -> None:
        """Watch the ranks until all of them have done their work."""
        while True:
            done = self._ranks.work.wait(POLL_S)
            report = self._poll()  # asked for after Train has ended, if it has
            if done and self._has_ended(report):
                break
        _, _, progress = report.news
        self._outcome.paused = is_paused((worker.step for worker in progress.workers.values()), self._job.steps)

    def _has_ended(self, report: GroupStatus) -> bool:
        """Return whether the run has ended, when Train has; if it has not, all ranks start again.

        Args:
            report: a report that was asked for after Train had ended.
        Raises:
            TrainingError: Train failed, or the ranks found no places in time.
        """
        result, error = self._train_result()
        missing_s = self._missing.seconds(self._cluster.clock.monotonic())
        match after_train(result, all_reported=report.ended, missing_s=missing_s, start_timeout_s=self._timeout_s):
            case AfterTrain.END:
                return True
            case AfterTrain.NO_PLACES:
                raise start_timeout(self._cluster, self._job, self._missing.names)
            case AfterTrain.FAIL:
                raise TrainingError(f"Ray Train gave up: {error}")
        lost = f"Ray Train: {getattr(error, 'cause', error)}".splitlines()[0]
        # The next report has this loss, as it has the losses of ranks.
        self._call("lose", "the ledger, when all ranks had ended" if error is None else lost)
        if result is TrainResult.LOST:
            self._ranks.work.release()
        self._ranks.start()
        return False

    def _train_result(self) -> tuple[TrainResult, Exception | None]:
        try:
            self._ranks.work.result()
        except GroupStartError as error:
            return TrainResult.NOT_STARTED, error
        except (WorkerCrashedError, NodeDiedError, *ENDED) as error:
            return TrainResult.LOST, error
        except RayTaskError as error:
            return TrainResult.RAISED, error
        return TrainResult.RETURNED, None

    def _poll(self) -> GroupStatus:
        """Tell the driver what happened, and count the losses."""
        report: GroupStatus = self._call("report", self._job.spec.resources.step_timeout_s, next(self._reports))
        records, completed, progress = report.news
        # The ranks report all values of a snapshot, so there are none to fetch from the ledger.
        take(self._job, self._driver, self._outcome, report.news, lambda _: {})
        if records:  # noted before a call that may meet the next loss
            self._outcome.note_recovery(WHOLE_RUN)
        if completed:
            self._call("drop_snapshot", list(completed))
        if report.failure is not None:
            name, why = report.failure
            raise failure(name, self._job.workers[name], progress.workers[name].step, why)
        self._records += len(records)
        for name in report.silent:
            about = {"task": self._job.workers[name], "worker": name, "step": progress.workers[name].step}
            log.warning("Worker '%s' made no step for too long; its process is ended.", name, extra=about)
        for message in report.lost:
            self._note_loss(message)
        self._check_start(report.processes)
        if self._driver.wants_pause() and not self._pausing:
            self._pausing = True
            self._call("pause")
        return report

    def _note_loss(self, message: str) -> None:
        self._outcome.note_loss(WHOLE_RUN)
        loss = self._losses.add(WHOLE_RUN, self._records)
        if loss.too_often:
            raise TrainingError(f"The worker group was lost {loss.count} times without a step made: {message}")
        where = self._driver.store.where() or "the start"
        log.warning("The worker group was lost (%s). All workers go back to %s.", message, where)

    def _check_start(self, joined: Collection[str]) -> None:
        """Fail when ranks have been missing for too long.

        Train waits for places for `start_timeout_s`, and ends in good order when it finds none. So this check gives
        Train more time, and finds the groups that hang for another reason.
        """
        now = self._cluster.clock.monotonic()
        self._missing = self._missing.updated(self._job.workers, joined, now)
        if self._missing.seconds(now) > self._timeout_s + TRAIN_START_S:
            raise start_timeout(self._cluster, self._job, self._missing.names)

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the ledger."""
        return self._caller.ask(lambda: getattr(self._ranks.ledger, method).remote(*arguments))

    def _hand_out_job(self) -> None:
        self._cluster.get(self._ranks.begin(), self._timeout_s)
        if self._pausing:
            self._cluster.get(self._ranks.ledger.pause.remote(), self._timeout_s)

    def _on_lost_ledger(self, error: Exception) -> None:
        if not isinstance(error, NotBegunError):  # a ledger that has just been started for the first time is not lost
            self._outcome.note_loss(WHOLE_RUN)
