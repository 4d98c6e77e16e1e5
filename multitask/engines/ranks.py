"""Engine `allreduce`: the ranks of a worker group, which hold all values and sum gradients among themselves."""

import logging
import os
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, cast

import ray
import torch
import torch.distributed as dist

from multitask.cluster.logs import log_to_stderr
from multitask.engines.ledger import WAIT
from multitask.engines.loss import Actor
from multitask.engines.operations import Operation
from multitask.engines.rank_server import LedgerConnection, RankServer, answer_of
from multitask.engines.reduction import PeerLostError, Reduction, peers, plan_buckets
from multitask.job.job import Job
from multitask.server.messages import Reply
from multitask.spec.engines import AllreduceSpec
from multitask.worker import TaskWorker, train_steps

log = logging.getLogger(__name__)


def train_rank(setting: Mapping[str, Any]) -> None:
    """Train one worker; Ray Train calls this in every process of a worker group. Rank i is the job's i-th worker.

    Args:
        setting: has the key `ledger`, with the LedgerActor.
    Raises:
        PeerLostError: another process is gone, and Ray Train starts the group again. All other errors are reported to
            the ledger.
    """
    actor: Actor = setting["ledger"]
    control = _new_group(backend="gloo")
    rank = dist.get_rank()
    message: list[Any] = [answer_of(actor.begin_group.remote()) if rank == 0 else None]
    with peers():
        dist.broadcast_object_list(message, src=0, group=control)
    ledger = LedgerConnection(actor, incarnation=message[0])
    job: Job = ledger.ask("job")
    name = list(job.workers)[rank]
    try:
        _train(job, name, ledger, control)
    except PeerLostError:
        raise
    except Exception as error:
        ray.get(actor.fail.remote(name, f"{error}\n{traceback.format_exc()}"))
        # The driver ends the run. Ray Train would start the group again if this exception reached it.
        threading.Event().wait()


def _train(job: Job, name: str, ledger: LedgerConnection, control: dist.ProcessGroup) -> None:
    torch.set_num_threads(job.spec.resources.threads_per_worker)
    about = {"run": job.spec.name, "task": job.workers[name], "worker": name}
    log_to_stderr(lambda: about)
    members = process_groups(job, name)
    reply, operations = join(ledger, name)
    worker = job.make_worker(name, job.make_batches(name, reply.position), (reply.step, reply.position))
    log_to_stderr(lambda: {**about, "step": worker.step})
    log.info("Trains to step %d.", job.spec.steps)
    reduction = make_reduction(job, worker, members)
    server = RankServer(job, worker, ledger, reduction, _steps_left(job, worker.step, control), operations)
    for _ in train_steps(worker, server, job.spec.steps, in_flight=0):
        pass
    server.rest(worker)
    worker.answer_last_requests(server)


def join(ledger: LedgerConnection, worker: str) -> tuple[Reply, list[Operation]]:
    """Let this process join the group as a worker.

    Returns:
        The reply, which says where the worker begins, and the operations that its `RankServer` must carry out first.
    """
    actor = ray.get_runtime_context().current_actor
    reply, operations = ledger.ask("join", worker, os.getpid(), actor)
    return reply, operations


def _new_group(ranks: Sequence[int] | None = None, backend: str | None = None) -> dist.ProcessGroup:
    """Make a process group for collectives; every rank must make all groups in the same order, its own or not.

    Args:
        ranks: members of the group; all ranks by default.
    """
    with peers():
        group = dist.new_group(ranks, timeout=WAIT, backend=backend)
    return cast(dist.ProcessGroup, group)  # A rank outside the group gets a marker instead, and does not use it.


def process_groups(job: Job, name: str) -> dict[str, dist.ProcessGroup]:
    """Return, for each group that a worker shares with other workers, the process group of all its users."""
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
    """Return the reduction of a worker's gradients; its backward pass starts the buckets.

    Args:
        members: what `process_groups` returned.
    """
    assert isinstance(job.spec.engine, AllreduceSpec)
    plan = plan_buckets({group.name: group.layout for group in job.served()}, job.spec.engine.bucket_mb)
    device = None if dist.get_backend() == "nccl" else torch.device("cpu")
    reduction = Reduction(plan, worker.gradients, members, device)
    reduction.watch(worker.learner.tensors())
    return reduction


def _steps_left(job: Job, step: int, control: dist.ProcessGroup) -> dict[str, int]:
    """Return worker -> steps that it must still make; every rank contributes its own number of steps made."""
    steps: list[int] = [0] * len(job.workers)
    with peers():
        dist.all_gather_object(steps, step, group=control)
    return {name: job.spec.steps - made for name, made in zip(job.workers, steps, strict=True)}
