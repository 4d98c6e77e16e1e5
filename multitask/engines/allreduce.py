"""Engine `allreduce`: a worker group of Ray Train whose workers sum their gradients among themselves.

Gradients meet as under `sync`, in one weighted mean per round; what differs is the way they take. Each worker is one
rank, holds the values of all groups that its task uses and applies every update itself; `multitask.engines.ranks` has
what runs inside the ranks.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from multitask.checkpoint import CheckpointStore
from multitask.engines.actors import Actor
from multitask.engines.interface import Driver, Outcome, take
from multitask.engines.ledger import FitSetting, LedgerActor, Report
from multitask.engines.ranks import train_rank
from multitask.engines.served import ALL, POLL_S, RESTARTS_WITHOUT_A_STEP, not_started, ray_session, worker_cpus
from multitask.job import Job
from multitask.server.progress import Progress
from multitask.worker import TrainingError

log = logging.getLogger(__name__)


def run(job: Job, driver: Driver) -> Outcome:
    """Train in a worker group of Ray Train, on the Ray that this process is connected to or on one started here.

    When a rank is lost, Train starts the group again, and all ranks and the ledger go back to the last checkpoint.

    Raises:
        TrainingError: a worker failed (with its name, task and traceback), workers found no place in time, or
            processes are lost again and again without a step made.
    """
    outcome = Outcome()
    with ray_session(), crew_of(job, driver.store) as crew:
        _Session(job, driver, outcome, crew).run()
    return outcome


class Crew:
    """The ledger, and Train's work as something to wait for."""

    def __init__(self, job: Job, store: CheckpointStore) -> None:
        resources = job.spec.resources
        cpus = resources.cpus_per_worker or worker_cpus(ray.cluster_resources().get("CPU", 1.0), len(job.workers))
        gpus = {"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}
        self._setting = FitSetting(
            train_rank,
            workers=len(job.workers),
            per_worker={"CPU": cpus, **gpus},
            start_timeout_s=resources.start_timeout_s,
            folder=job.spec.run_directory.resolve() / "train",
        )
        self.ledger: Actor = ray.remote(LedgerActor).options(num_cpus=0, max_restarts=-1).remote(job, store)
        self.start()

    def start(self) -> None:
        self.fit = self.ledger.fit.remote(self._setting)


@contextlib.contextmanager
def crew_of(job: Job, store: CheckpointStore) -> Iterator[Crew]:
    """The processes of a run, ended with the block."""
    crew = Crew(job, store)
    try:
        yield crew
    finally:
        ray.kill(crew.ledger)


class _Session:
    """The driver's side, from the start of Train's group to its end."""

    def __init__(self, job: Job, driver: Driver, outcome: Outcome, crew: Crew) -> None:
        self._job, self._driver, self._outcome, self._crew = job, driver, outcome, crew
        self._pausing = False
        self._losses = 0
        self._made_steps = False
        self._late_since: float | None = time.monotonic()
        """Since when ranks are missing."""

    def run(self) -> None:
        while True:
            done, _ = ray.wait([self._crew.fit], timeout=POLL_S)
            progress = self._poll()
            if done and self._has_ended():
                break
        self._outcome.paused = min(worker.step for worker in progress.workers.values()) < self._job.spec.steps

    def _has_ended(self) -> bool:
        """False where the ledger was lost, and with it the ranks: then all start again."""
        try:
            ray.get(self._crew.fit)
        except RayTaskError as error:
            raise TrainingError(f"Ray Train gave up: {error}") from None
        except RayActorError as error:
            self._lose(f"its ledger: {error}".splitlines()[0])
            if self._pausing:
                self._call("pause")
            self._crew.start()
            return False
        return True

    def _poll(self) -> Progress:
        """Tell the driver what happened; count what was lost."""
        report: Report = self._call("report", self._job.spec.resources.step_timeout_s)
        records, completed, progress = report.news
        # The ranks hand in all values, so the ledger keeps none.
        take(self._job, self._driver, self._outcome, report.news, lambda _: {})
        if completed:
            self._call("release", list(completed))
        if report.failure is not None:
            raise TrainingError(report.failure)
        self._made_steps = self._made_steps or bool(records)
        for name in report.silent:
            log.warning("Worker '%s' made no step for too long; its process is ended.", name)
        for message in report.lost:
            self._lose(message)
        if records:
            self._outcome.back(ALL)
        self._await_start(report)
        if self._driver.wants_pause() and not self._pausing:
            self._pausing = True
            self._call("pause")
        return progress

    def _lose(self, message: str) -> None:
        self._outcome.lose(ALL)
        self._losses = 1 if self._made_steps else self._losses + 1
        self._made_steps = False
        if self._losses > RESTARTS_WITHOUT_A_STEP:
            raise TrainingError(f"The worker group was lost {self._losses} times without a step made: {message}")
        where = self._driver.store.where() or "the start"
        log.warning("The worker group was lost (%s). All workers go back to %s.", message, where)

    def _await_start(self, report: Report) -> None:
        late = [name for name in self._job.workers if name not in report.processes]
        if not late:
            self._late_since = None
            return
        self._late_since = self._late_since or time.monotonic()
        if time.monotonic() - self._late_since > self._job.spec.resources.start_timeout_s:
            raise not_started(self._job, late)

    def _call(self, method: str, *arguments: Any) -> Any:
        """Ask the ledger, until it is back where it was lost."""
        timeout_s = self._job.spec.resources.start_timeout_s
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return ray.get(getattr(self._crew.ledger, method).remote(*arguments), timeout=timeout_s)
            except RayActorError as error:
                if time.monotonic() > deadline:
                    raise TrainingError(f"The ledger of the run did not come back within {timeout_s:g} s.") from error
                time.sleep(POLL_S)
            except GetTimeoutError:
                raise TrainingError(f"The ledger of the run did not answer within {timeout_s:g} s.") from None
