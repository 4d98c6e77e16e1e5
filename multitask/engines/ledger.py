"""Engine `allreduce`: the ledger, which decides as a parameter server does, and holds no values."""

import asyncio
import importlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray

from multitask.checkpoint import CheckpointStore
from multitask.engines.actors import Actor
from multitask.engines.metrics import ServerMetrics
from multitask.job import Job
from multitask.server.messages import Gradients, Push, PushRejectedError, Reply, StepRecord
from multitask.server.parameter_server import Completed
from multitask.server.progress import Progress
from multitask.server.shard import Key, Shard, Update

HEALTH_CHECK_S = 0.5
"""Between two looks of Train at its workers: so long a loss goes unnoticed."""
WAIT = timedelta(days=1)
"""How long a collective waits for others, who may be evaluating: Train and the ledger notice who is lost or hangs."""


@dataclass(frozen=True)
class Apply:
    """A round's update, empty where all pushes were refused."""

    update: Update


@dataclass(frozen=True)
class Keep:
    """Put the values aside as they stand."""

    version: int
    slots: bool


@dataclass(frozen=True)
class Release:
    version: int


Operation = Apply | Keep | Release


class Ledger(Shard):
    """A shard without values: it writes down what the server would have it do, for the ranks that hold them."""

    def __init__(self, workers: Iterable[str]) -> None:
        super().__init__({})
        self._unread: dict[str, list[Operation]] = {worker: [] for worker in workers}

    def read(self, worker: str) -> list[Operation]:
        """What happened since this worker read last."""
        unread, self._unread[worker] = self._unread[worker], []
        return unread

    def news(self, worker: str) -> bool:
        return bool(self._unread[worker])

    def stash(self, key: Key, gradients: Gradients, names: Iterable[str]) -> str | None:  # noqa: ARG002
        return None

    def apply(self, update: Update, done: Iterable[Key]) -> None:  # noqa: ARG002
        self._write(Apply(update))

    def keep(self, version: int, slots: bool) -> None:
        self._write(Keep(version, slots))

    def release(self, version: int) -> None:
        self._write(Release(version))

    def _write(self, operation: Operation) -> None:
        for unread in self._unread.values():
            unread.append(operation)


@dataclass(frozen=True)
class FitSetting:
    """What Ray Train has to know."""

    train_rank: Callable[[Mapping[str, Any]], None]
    """What every rank runs; its argument holds `ledger`."""
    workers: int
    per_worker: dict[str, float]
    """What each worker asks of the cluster: CPU, GPU."""
    start_timeout_s: float
    """How long a group may take to start before Train tries again."""
    folder: Path
    """For files of Train's own."""


@dataclass(frozen=True)
class Report:
    """What the driver hears of a worker group now and then."""

    news: tuple[list[StepRecord], dict[int, Completed], Progress]
    """What `ParameterServer.drain` returned."""
    processes: dict[str, int]
    """Worker -> process id, of those that have joined the present group."""
    silent: list[str]
    lost: list[str]
    """What was lost since the last report."""
    failure: str | None
    """Why the run cannot go on; names the worker."""


class LedgerActor:
    """The server of engine `allreduce`: it counts and decides as any other, and holds no values.

    It starts the groups of ranks, too, one after the other as Ray Train finds that a rank was lost; each goes on from
    the latest checkpoint. The ranks belong to this process and go with it; Ray starts it again when it is lost.
    """

    def __init__(self, job: Job, store: CheckpointStore) -> None:
        self._job, self._store = job, store
        self._pause_wanted = False
        self._lost: list[str] = []
        self._failure: str | None = None
        self._begin()

    def _begin(self) -> None:
        self._restored = job = self._job.restored(self._store.latest())
        self._ledger = Ledger(job.workers)
        self._server = job.make_server(self._ledger, on_record=ServerMetrics(job).note)
        if self._pause_wanted:
            self._server.pause()
        self._group = time.time_ns()
        """Names the group of ranks: those of an earlier one are answered no more."""
        self._actors: dict[str, Actor] = {}
        self._processes: dict[str, int] = {}
        self._resting: set[str] = set()
        self._changed = asyncio.Event()

    # What ranks call.

    async def begin(self) -> int:
        """A new group of ranks starts, at the latest checkpoint; returns its number."""
        self._notify()
        self._begin()
        return self._group

    async def job(self, group: int) -> Job:
        """The job at the checkpoint that the group starts from: one reading of it for all ranks."""
        self._check(group)
        return self._restored

    async def join(self, group: int, worker: str, process: int, actor: Actor) -> tuple[Reply, list[Operation]]:
        """A worker begins, at the step where the server stands."""
        self._check(group)
        self._server.join(worker, 0, None)
        self._actors[worker], self._processes[worker] = actor, process
        return await self._answer(group, worker)

    async def pull(self, group: int, worker: str) -> tuple[Reply, list[Operation]]:
        return await self._answer(group, worker)

    async def push(self, group: int, push: Push) -> tuple[Reply, list[Operation]]:
        self._check(group)
        self._server.push(push, {})
        return await self._answer(group, push.worker)

    async def call(self, group: int, method: str, *arguments: Any) -> Any:
        self._check(group)
        answer = getattr(self._server, method)(*arguments)
        self._notify()
        return answer

    async def rest(self, group: int, worker: str) -> tuple[list[Operation], bool]:
        """A worker has made its steps, or pauses: what the others do meanwhile, and whether all of them rest."""
        self._check(group)
        if worker not in self._resting:
            self._resting.add(worker)
            if self._all_rest() and self._pause_wanted:
                self._server.put_aside()
            self._notify()
        while not (self._ledger.news(worker) or self._all_rest()):
            await self._change(group)
        return self._ledger.read(worker), self._all_rest()

    async def fail(self, message: str) -> None:
        """A worker raised: the run ends. The first message counts, what follows from it does not."""
        self._failure = self._failure or message

    # What the driver and Train's controller call.

    async def fit(self, setting: FitSetting) -> None:
        """Run groups of ranks, until one comes to its end."""
        await asyncio.to_thread(fit, ray.get_runtime_context().current_actor, setting)

    async def report(self, silent_s: float) -> Report:
        """Args:
        silent_s: a worker of which nothing was heard for so long, though it waits for nobody, is ended; Train does the
            rest.
        """
        silent = [worker for worker in self._server.silent(silent_s) if worker in self._actors]
        for worker in silent:
            ray.kill(self._actors.pop(worker))
        lost, self._lost = self._lost, []
        return Report(self._server.drain(), dict(self._processes), silent, lost, self._failure)

    async def release(self, versions: Sequence[int]) -> None:
        for version in versions:
            self._server.release(version)

    async def pause(self) -> None:
        self._pause_wanted = True
        self._server.pause()

    async def lose(self, message: str) -> None:
        self._lost.append(message)

    # How it is done.

    def _check(self, group: int) -> None:
        if group != self._group:
            raise PushRejectedError("This worker group's place was taken by a newer one; its processes have to end.")

    async def _answer(self, group: int, worker: str) -> tuple[Reply, list[Operation]]:
        self._check(group)
        self._notify()
        while (reply := self._server.reply(worker)) is None:
            await self._change(group)
        return reply, self._ledger.read(worker)

    def _all_rest(self) -> bool:
        return self._resting == set(self._job.workers)

    async def _change(self, group: int) -> None:
        await self._changed.wait()
        self._check(group)

    def _notify(self) -> None:
        """Let those who wait look again."""
        self._changed.set()
        self._changed = asyncio.Event()


def fit(ledger: Actor, setting: FitSetting) -> None:
    """Let Ray Train run worker groups, until one comes to its end. Blocks."""
    os.environ |= {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(HEALTH_CHECK_S),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(setting.start_timeout_s),
        # Ranks read data where the spec says, which may be relative to the folder that the run began in.
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }
    # Here, because it takes a second and no other engine needs it; Any, because its types are those of its version 1.
    train: Any = importlib.import_module("ray.train")
    train_torch: Any = importlib.import_module("ray.train.torch")

    class Losses(train.UserCallback):
        """Tells the ledger when Train has noticed that a rank is gone."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
            texts = [f"rank {rank}: {str(error).splitlines()[0]}" for rank, error in worker_exceptions.items()]
            ledger.lose.remote("; ".join(texts))

    # NCCL refuses two ranks on one device.
    shares_device = 0 < setting.per_worker.get("GPU", 0) < 1
    train_torch.TorchTrainer(
        setting.train_rank,
        train_loop_config={"ledger": ledger},
        torch_config=train_torch.TorchConfig(
            backend="gloo" if shares_device else None, timeout_s=int(WAIT.total_seconds())
        ),
        scaling_config=train.ScalingConfig(
            num_workers=setting.workers, use_gpu="GPU" in setting.per_worker, resources_per_worker=setting.per_worker
        ),
        run_config=train.RunConfig(
            name=setting.folder.name,
            storage_path=str(setting.folder.parent),
            # For ever: who is lost without a step made in between, the driver counts.
            failure_config=train.FailureConfig(max_failures=-1),
            callbacks=[Losses()],
            logging_config=train.LoggingConfig(log_level="ERROR"),
        ),
    ).fit()
