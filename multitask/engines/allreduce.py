"""Engine `allreduce`: a worker group of Ray Train whose workers sum their gradients among themselves.

Gradients meet as under `sync`, in one weighted mean per round; what differs is the way they take. Each worker is one
rank, holds the values of all groups that its task uses and applies every update itself; `multitask.engines.ranks` has
what runs inside the ranks.
"""

import contextlib
import importlib
import itertools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from multitask.cluster.arithmetic import Demand
from multitask.cluster.memory import FOR_ALL_THREADS
from multitask.cluster.places import check_places, cluster_nodes, demands
from multitask.cluster.session import ray_session
from multitask.engines.interface import Driver, Outcome, take
from multitask.engines.ledger import WAIT, GroupStatus, LedgerActor
from multitask.engines.loss import LOST, Actor, NotBegunError
from multitask.engines.ranks import train_rank
from multitask.engines.served import ALL, POLL_S, RESTARTS_WITHOUT_A_STEP, not_started
from multitask.errors import TrainingError, failure
from multitask.job.checkpoint import CheckpointStore
from multitask.job.job import Job

HEALTH_CHECK_S = 0.5
"""Between two looks of Train at its workers: so long a loss goes unnoticed."""
TRAIN_START_S = 60.0
"""How long Train's own processes and the ranks may take to start, beside the wait for places."""
END_S = 60.0
"""How long Train may take to start a group before its end, and to end."""

log = logging.getLogger(__name__)


def run(job: Job, driver: Driver) -> Outcome:
    """Train in a worker group of Ray Train, on the Ray that this process is connected to or on one started here.

    When a rank is lost, Train starts the group again, and all ranks and the ledger go back to the last checkpoint.

    Raises:
        PlacementError: the cluster has no room for all workers.
        TrainingError: a worker failed (with its name, task, steps and traceback), workers found no place in time, or
            processes are lost again and again without a step made.
    """
    outcome = Outcome()
    with ray_session():
        check_places(job.spec)
        with rank_group(job, driver.store) as crew:
            AllreduceRun(job, driver, outcome, crew).run()
    return outcome


class StartError(RuntimeError):
    """Train could not start a group."""


class RankGroup:
    """The ledger, and Train's work as something to wait for."""

    def __init__(self, job: Job, store: CheckpointStore) -> None:
        self._job, self._store = job, store
        self.ledger: Actor = ray.remote(LedgerActor).options(num_cpus=0, max_restarts=-1).remote()
        self.start()

    def begin(self) -> "ray.ObjectRef[None]":
        """Tell the ledger what to work on."""
        begun: ray.ObjectRef[None] = self.ledger.begin.remote(self._job, self._store)
        return begun

    def start(self) -> None:
        resources = self._job.spec.resources
        demand = next(iter(demands(self._job.spec, cluster_nodes()).values()))  # the spec sees to it that all are alike
        strategy = "SPREAD" if resources.placement == "spread" else "PACK"
        folder = self._job.spec.run_directory.resolve() / "train"
        variables = {
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(HEALTH_CHECK_S),
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(resources.start_timeout_s),
            # Ranks read data where the spec says, which may be relative to the folder that the run began in.
            "RAY_CHDIR_TO_TRIAL_DIR": "0",
            # Train runs a rank in a thread.
            **FOR_ALL_THREADS,
        }
        task = ray.remote(fit).options(num_cpus=0, max_retries=0, runtime_env={"env_vars": variables})
        self.fit = task.remote(self.ledger, len(self._job.workers), demand, strategy, folder)

    def end(self) -> None:
        # Train hears a cancel as a Ctrl-C, on which alone it gives back its places on the cluster; while it starts a
        # group it hears nothing, and would leave the group's places behind. A cancel that went on to Train's own calls
        # would look to it like a lost rank.
        deadline = time.monotonic() + END_S
        while self._is_starting() and not self._has_ended() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        ray.cancel(self.fit, recursive=False)
        if not self._has_ended(END_S):
            log.warning("Ray Train did not end within %g s; it may still hold its places on the cluster.", END_S)
        ray.kill(self.ledger)

    def _has_ended(self, timeout_s: float = 0.0) -> bool:
        done, _ = ray.wait([self.fit], timeout=timeout_s)
        return bool(done)

    def _is_starting(self) -> bool:
        try:
            starting: bool = ray.get(self.ledger.starting.remote(), timeout=END_S)
        except (*LOST, GetTimeoutError):
            return True
        return starting


@contextlib.contextmanager
def rank_group(job: Job, store: CheckpointStore) -> Iterator[RankGroup]:
    """The processes of a run, ended with the block."""
    crew = RankGroup(job, store)
    try:
        yield crew
    finally:
        crew.end()


def fit(ledger: Actor, workers: int, demand: Demand, strategy: str, folder: Path) -> None:
    """Let Ray Train run groups of ranks, one after the other as ranks are lost, until one comes to its end.

    Args:
        demand: what each of them asks of the cluster.
        strategy: of their placement group.
        folder: for files of Train's own.
    Raises:
        StartError: they found no places in time, or were lost while they started.
    """
    # Here, because it takes a second and no other engine needs it; Any, because its types are those of its version 1.
    train: Any = importlib.import_module("ray.train")
    train_torch: Any = importlib.import_module("ray.train.torch")

    class Losses(train.UserCallback):
        """Tells the ledger when Train has noticed that a rank is gone."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
            texts = [f"rank {rank}: {str(error).splitlines()[0]}" for rank, error in worker_exceptions.items()]
            ledger.lose.remote("; ".join(texts))

    # NCCL refuses two ranks on one device.
    shares_device = 0 < demand.resources.get("GPU", 0) < 1
    trainer = train_torch.TorchTrainer(
        train_rank,
        train_loop_config={"ledger": ledger},
        torch_config=train_torch.TorchConfig(
            backend="gloo" if shares_device else None, timeout_s=int(WAIT.total_seconds())
        ),
        scaling_config=train.ScalingConfig(
            num_workers=workers,
            use_gpu="GPU" in demand.resources,
            resources_per_worker=dict(demand.resources),
            label_selector=dict(demand.labels) or None,
            placement_strategy=strategy,
        ),
        run_config=train.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            # For ever: who is lost without a step made in between, the driver counts.
            failure_config=train.FailureConfig(max_failures=-1, controller_failure_limit=0),
            callbacks=[Losses()],
            logging_config=train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        trainer.fit()
    except train.ControllerError as error:
        raise StartError(str(error)) from None


class AllreduceRun:
    """The driver's side, from the start of Train's group to its end."""

    def __init__(self, job: Job, driver: Driver, outcome: Outcome, crew: RankGroup) -> None:
        self._job, self._driver, self._outcome, self._crew = job, driver, outcome, crew
        self._pausing = False
        self._numbers = itertools.count(1)
        """Of reports."""
        self._losses = 0
        self._made_steps = False
        self._late = list(job.workers)
        """Ranks that are missing."""
        self._late_since: float | None = time.monotonic()

    def run(self) -> None:
        while True:
            done, _ = ray.wait([self._crew.fit], timeout=POLL_S)
            report = self._poll()
            if done and self._has_ended(report):
                break
        _, _, progress = report.news
        self._outcome.paused = min(worker.step for worker in progress.workers.values()) < self._job.spec.steps

    def _has_ended(self, report: GroupStatus) -> bool:
        """False where Train was lost, and with it the ranks, or the ledger after them: then all start again.

        Args:
            report: one that was asked for after Train had ended.
        """
        try:
            ray.get(self._crew.fit)
        except (StartError, WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
            if isinstance(error, StartError) and self._late_s() > self._job.spec.resources.start_timeout_s:
                raise not_started(self._job, self._late) from None
            lost = f"Ray Train: {getattr(error, 'cause', error)}".splitlines()[0]
        except RayTaskError as error:
            raise TrainingError(f"Ray Train gave up: {error}") from None
        else:
            if report.ended:
                return True
            lost = "the ledger, when all ranks had ended"
        # `_poll` hears of it from the ledger, as of lost ranks.
        self._call("lose", lost)
        self._crew.start()
        return False

    def _poll(self) -> GroupStatus:
        """Tell the driver what happened; count what was lost."""
        report: GroupStatus = self._call("report", self._job.spec.resources.step_timeout_s, next(self._numbers))
        records, completed, progress = report.news
        # The ranks hand in all values, so the ledger keeps none.
        take(self._job, self._driver, self._outcome, report.news, lambda _: {})
        if records:  # before anything that may meet the next loss
            self._outcome.back(ALL)
        if completed:
            self._call("drop_snapshot", list(completed))
        if report.failure is not None:
            name, why = report.failure
            raise failure(name, self._job.workers[name], progress.workers[name].step, why)
        self._made_steps = self._made_steps or bool(records)
        for name in report.silent:
            about = {"task": self._job.workers[name], "worker": name, "step": progress.workers[name].step}
            log.warning("Worker '%s' made no step for too long; its process is ended.", name, extra=about)
        for message in report.lost:
            self._lose(message)
        self._await_start(report)
        if self._driver.wants_pause() and not self._pausing:
            self._pausing = True
            self._call("pause")
        return report

    def _lose(self, message: str) -> None:
        self._outcome.lose(ALL)
        self._losses = 1 if self._made_steps else self._losses + 1
        self._made_steps = False
        if self._losses > RESTARTS_WITHOUT_A_STEP:
            raise TrainingError(f"The worker group was lost {self._losses} times without a step made: {message}")
        where = self._driver.store.where() or "the start"
        log.warning("The worker group was lost (%s). All workers go back to %s.", message, where)

    def _await_start(self, report: GroupStatus) -> None:
        self._late = [name for name in self._job.workers if name not in report.processes]
        if not self._late:
            self._late_since = None
            return
        self._late_since = self._late_since or time.monotonic()
        # Train waits as long for their places, and ends in good order when there are none.
        if self._late_s() > self._job.spec.resources.start_timeout_s + TRAIN_START_S:
            raise not_started(self._job, self._late)

    def _late_s(self) -> float:
        """How long ranks have been missing."""
        return 0.0 if self._late_since is None else time.monotonic() - self._late_since

    def _call(self, method: str, *arguments: Any) -> Any:
        """Ask the ledger, from its beginning on, until it is back where it was lost."""
        timeout_s = self._job.spec.resources.start_timeout_s
        deadline = time.monotonic() + timeout_s
        begin = False
        while True:
            try:
                if begin:
                    ray.get(self._crew.begin(), timeout=timeout_s)
                if begin and self._pausing:
                    ray.get(self._crew.ledger.pause.remote(), timeout=timeout_s)
                return ray.get(getattr(self._crew.ledger, method).remote(*arguments), timeout=timeout_s)
            except LOST as error:
                begin = isinstance(error, NotBegunError)
                if not begin:
                    self._outcome.lose(ALL)
                if time.monotonic() > deadline:
                    raise TrainingError(f"The ledger of the run did not come back within {timeout_s:g} s.") from error
                time.sleep(POLL_S)
            except GetTimeoutError:
                raise TrainingError(f"The ledger of the run did not answer within {timeout_s:g} s.") from None
