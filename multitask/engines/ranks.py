"""Engine `allreduce`: the ranks of a worker group, which hold all values and sum gradients among themselves."""

import logging
import os
import threading
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import ray
import torch
import torch.distributed as dist

from multitask.cluster.logs import log_to_stderr
from multitask.data import prefetch
from multitask.engines.ledger import WAIT, Apply, DropSnapshot, Operation, TakeSnapshot
from multitask.engines.loss import LOST, Actor
from multitask.engines.reduction import PeerLostError, Reduction, peers, plan_buckets
from multitask.job.job import Job
from multitask.server.layout import named_tensors
from multitask.server.messages import (
    Gradients,
    GroupValues,
    Push,
    PushRejectedError,
    Reply,
    SnapshotRequest,
    as_tensor,
    is_finite,
)
from multitask.server.shard import Update, shares
from multitask.spec.schema import AllreduceSpec
from multitask.worker import TaskWorker, Values, train_steps

log = logging.getLogger(__name__)


class RankServer:
    """The server as a rank sees it: the ledger decides, and the rank itself holds, sums and applies.

    Every rank does the same to the groups it holds, in the same order, so their bits stay equal.
    """

    def __init__(self, job: Job, worker: str, ledger: Actor, group: int) -> None:
        self._job, self._worker, self._ledger, self._group = job, worker, ledger, group
        self._replica = job.make_replica(worker)
        users = {name: [w for w in job.workers if job.workers[w] in job.groups[name].tasks] for name in job.groups}
        self._users = {name: users[name] for name in self._replica.groups}
        self._owned = [name for name, workers in self._users.items() if workers[0] == worker]
        """The groups that this rank hands in, where all that use them hold the same."""
        self._steps_left: dict[str, int] = {}
        self._reduction: Reduction | None = None
        self._gradients: Mapping[str, torch.Tensor] = {}

    def join(self) -> Reply:
        """Make the worker known; the answer says where it begins."""
        actor = ray.get_runtime_context().current_actor
        reply, operations = self._ask("join", self._worker, os.getpid(), actor)
        self._follow(operations)
        return reply

    def meet(self, worker: TaskWorker, reduction: Reduction, steps_left: Mapping[str, int]) -> None:
        """Args:
        reduction: over this worker's gradients.
        steps_left: worker -> steps that it has still to make, for all workers.
        """
        self._gradients, self._reduction, self._steps_left = worker.gradients, reduction, dict(steps_left)
        worker.before_last_backward = self._arm

    def pull(self, worker: str) -> tuple[Reply, Values]:
        reply, operations = self._ask("pull", worker)
        self._follow(operations)
        return reply, self._values()

    def push(self, push: Push, gradients: Gradients) -> "ray.ObjectRef[tuple[Reply, list[Operation]]]":
        problem = push.problem or _problem(gradients)
        handle = self._ledger.push.remote(self._group, replace(push, problem=problem))
        assert self._reduction is not None
        if not self._reduction.armed:
            self._arm()
        self._reduction.flush()
        return handle

    def wait(self, handle: "ray.ObjectRef[tuple[Reply, list[Operation]]]") -> tuple[Reply, Values]:
        assert self._reduction is not None
        sums = self._reduction.finish()
        reply, operations = _get(handle)
        self._follow(operations, sums)
        return reply, self._values()

    def snapshot(self, version: int, worker: str) -> Values:  # noqa: ARG002
        return {name: [group] for name, group in self._snapshot_at(version).items()}

    def snapshot_requests(self, worker: str) -> tuple[SnapshotRequest, ...]:
        requests: tuple[SnapshotRequest, ...]
        requests, operations = self._ask("snapshot_requests", worker)
        self._follow(operations)
        return requests

    def report_state(
        self, request: SnapshotRequest, worker: str, step: int, position: int, private: dict[str, GroupValues]
    ) -> None:
        held = private | self._held_here(request.version, slots=True)
        self._ask("call", "report_state", request, worker, step, position, held)

    def report_evaluation(
        self, request: SnapshotRequest, task: str, metrics: dict[str, float], private: dict[str, GroupValues]
    ) -> None:
        held = private | self._held_here(request.version, slots=False)
        self._ask("call", "report_evaluation", request, task, metrics, held)

    def report_alive(self, worker: str) -> None:
        self._ask("call", "report_alive", worker)

    def finish(self, worker: str) -> None:
        self._ask("call", "finish", worker)

    def rest(self, worker: TaskWorker) -> None:
        """After its last step: apply what the others do, and hand in what is asked for, until all have made theirs."""
        ended = False
        while not ended:
            operations, ended = self._ask("rest", self._worker)
            self._follow(operations)
            worker.answer_requests(self)

    def _ask(self, method: str, *arguments: Any) -> Any:
        return _get(getattr(self._ledger, method).remote(self._group, *arguments))

    def _values(self) -> Values:
        return {name: [group.view()] for name, group in self._replica.groups.items()}

    def _snapshot_at(self, version: int) -> dict[str, GroupValues]:
        kept = self._replica.snapshot(version)
        assert kept is not None, "whoever hears what is asked has followed the ledger up to there"
        return kept

    def _held_here(self, version: int, *, slots: bool) -> dict[str, GroupValues]:
        kept = self._snapshot_at(version)
        groups = {name: kept[name] for name in self._owned}
        return groups if slots else {name: GroupValues(g.values, g.counters) for name, g in groups.items()}

    def _arm(self) -> None:
        """Before gradients leave: what this worker's part is, if every push is good."""
        assert self._reduction is not None
        self._reduction.arm({name: self._factor(self._expected(name)) for name in self._users})

    def _expected(self, name: str) -> list[str]:
        """The workers whose pushes this round brings for a group."""
        return [worker for worker in self._users[name] if self._steps_left[worker] > 0]

    def _factor(self, workers: Sequence[str]) -> float | None:
        """What this worker's gradient is multiplied by in a sum over these; None if it is not among them."""
        if self._worker not in workers:
            return None
        factors, _ = shares([self._job.task(self._job.workers[worker]).weight for worker in workers])
        return factors[workers.index(self._worker)]

    def _follow(self, operations: Iterable[Operation], sums: Mapping[str, torch.Tensor] | None = None) -> None:
        """Do what the ledger has written down.

        Args:
            sums: of the round that the first `Apply` closes; without them this worker made no push in it.
        """
        for operation in operations:
            match operation:
                case Apply(update):
                    self._apply(update, self._sums_without_a_push() if sums is None else sums)
                    sums = None
                case TakeSnapshot(version, slots):
                    self._replica.take_snapshot(version, slots)
                case DropSnapshot(version):
                    self._replica.drop_snapshot(version)

    def _sums_without_a_push(self) -> Mapping[str, torch.Tensor]:
        assert self._reduction is not None, "no round ends before all ranks have joined"
        self._arm()
        return self._reduction.finish()

    def _apply(self, update: Update, sums: Mapping[str, torch.Tensor]) -> None:
        assert self._reduction is not None
        for name, step in update.items():
            if name not in self._users:
                continue
            workers = [worker for worker, *_ in step.pushes]
            if name not in sums:  # nobody else uses this group
                total = self._gradients[name]
            elif workers == self._expected(name):
                total = sums[name]
            else:
                # A push was rejected: what it brought may be in the sums.
                total = self._reduction.again(name, self._factor(workers))
            if name in sums:
                total.div_(shares(step.weights)[1])
            self._replica.groups[name].apply(total.cpu(), step.rate)
        for worker in self._steps_left:
            self._steps_left[worker] -= 1


def train_rank(setting: Mapping[str, Any]) -> None:
    """What Ray Train runs in every process of a worker group: rank i is the i-th worker of the job.

    Args:
        setting: `ledger`, the LedgerActor.
    Raises:
        PeerLostError: another process is gone, and Train starts the group again. All else the ledger is told.
    """
    ledger: Actor = setting["ledger"]
    control = _new_group(backend="gloo")
    rank = dist.get_rank()
    message: list[Any] = [_get(ledger.begin_group.remote()) if rank == 0 else None]
    with peers():
        dist.broadcast_object_list(message, src=0, group=control)
    group: int = message[0]
    job: Job = _get(ledger.job.remote(group))
    name = list(job.workers)[rank]
    try:
        _train(job, name, ledger, group, control)
    except PeerLostError:
        raise
    except Exception as error:
        ray.get(ledger.fail.remote(name, f"{error}\n{traceback.format_exc()}"))
        # The driver ends the run. Train, were it told, would start the group again.
        threading.Event().wait()


def _train(job: Job, name: str, ledger: Actor, group: int, control: dist.ProcessGroup) -> None:
    torch.set_num_threads(job.spec.resources.threads_per_worker)
    about = {"run": job.spec.name, "task": job.workers[name], "worker": name}
    log_to_stderr(lambda: about)
    members = process_groups(job, name)
    server = RankServer(job, name, ledger, group)
    reply = server.join()
    worker = job.make_worker(name, prefetch(job.make_batches(name, reply.position)), (reply.step, reply.position))
    log_to_stderr(lambda: {**about, "step": worker.step})
    log.info("Trains to step %d.", job.spec.steps)
    server.meet(worker, make_reduction(job, worker, members), _steps_left(job, worker.step, control))
    for _ in train_steps(worker, server, job.spec.steps, in_flight=0):
        pass
    server.rest(worker)
    worker.answer_last_requests(server)


def _new_group(ranks: Sequence[int] | None = None, backend: str | None = None) -> dist.ProcessGroup:
    """Processes that sum among themselves; every process makes every group, in one order."""
    with peers():
        group = dist.new_group(ranks, timeout=WAIT, backend=backend)
    return cast(dist.ProcessGroup, group)  # or a mark, for those outside the group


def process_groups(job: Job, name: str) -> dict[str, dist.ProcessGroup]:
    """Group -> the processes of the workers that use it, for a worker's groups that others use too."""
    members: dict[tuple[int, ...], dist.ProcessGroup] = {}
    found = {}
    for group in job.served():
        ranks = tuple(rank for rank, task in enumerate(job.workers.values()) if task in group.tasks)
        if len(ranks) > 1 and ranks not in members:
            members[ranks] = _new_group(ranks)
        if len(ranks) > 1 and list(job.workers).index(name) in ranks:
            found[group.name] = members[ranks]
    return found


def make_reduction(job: Job, worker: TaskWorker, members: Mapping[str, dist.ProcessGroup]) -> Reduction:
    """The sums over a worker's gradients, with its backward pass started buckets."""
    assert isinstance(job.spec.engine, AllreduceSpec)
    plan = plan_buckets({group.name: group.layout for group in job.served()}, job.spec.engine.bucket_mb)
    device = None if dist.get_backend() == "nccl" else torch.device("cpu")
    reduction = Reduction(plan, worker.gradients, members, device)
    reduction.watch(named_tensors(worker.model.network))
    return reduction


def _steps_left(job: Job, step: int, control: dist.ProcessGroup) -> dict[str, int]:
    """Worker -> steps that it has still to make, as each one says of itself."""
    steps: list[int] = [0] * len(job.workers)
    with peers():
        dist.all_gather_object(steps, step, group=control)
    return {name: job.spec.steps - made for name, made in zip(job.workers, steps, strict=True)}


def _get(answer: "ray.ObjectRef[Any]") -> Any:
    try:
        return ray.get(answer)
    except (*LOST, PushRejectedError) as error:
        raise PeerLostError(f"The ledger was lost, or this worker group was: {error}") from error


def _problem(gradients: Gradients) -> str | None:
    """What `Shard.stash` would find wrong."""
    bad = [name for name, gradient in gradients.items() if not is_finite(as_tensor(gradient))]
    return f"it holds a gradient that is not finite in group '{bad[0]}'" if bad else None
