"""Engine `allreduce`: the ranks of a worker group, which hold all values and sum gradients among themselves."""

import logging
import traceback
from collections.abc import Mapping

import torch

from multitask.cluster.collectives import Collectives, Members, PeerLostError
from multitask.cluster.interface import Actor, Cluster
from multitask.engines.operations import Operation
from multitask.engines.rank_server import LedgerConnection, RankServer, answer_of
from multitask.engines.reduction import Reduction, plan_buckets
from multitask.job.job import Job
from multitask.server.messages import Reply
from multitask.spec.engines import AllreduceSpec
from multitask.worker import TaskWorker, train_steps

FOR_EVER_S = 24 * 3600.0

log = logging.getLogger(__name__)


def train_rank(cluster: Cluster, actor: Actor) -> None:
    """Train one worker; every rank of a group calls this. Rank i is the job's i-th worker.

    Args:
        actor: the LedgerActor.
    Raises:
        PeerLostError: another process is gone, and the cluster starts the group again. All other errors are reported to
            the ledger.
    """
    ranks = cluster.collectives()
    begun = answer_of(cluster, actor.begin_group.remote()) if ranks.rank == 0 else None
    ledger = LedgerConnection(cluster, actor, incarnation=ranks.broadcast(begun))
    job: Job = ledger.ask("job")
    name = list(job.workers)[ranks.rank]
    try:
        _train(job, name, ledger, ranks)
    except PeerLostError:
        raise
    except Exception as error:
        cluster.get(actor.fail.remote(name, f"{error}\n{traceback.format_exc()}"))
        # The driver ends the run. The cluster would start the group again if this exception reached it.
        while True:
            cluster.clock.sleep(FOR_EVER_S)


def _train(job: Job, name: str, ledger: LedgerConnection, ranks: Collectives) -> None:
    torch.set_num_threads(job.spec.resources.threads_per_worker)
    about = {"run": job.spec.name, "task": job.workers[name], "worker": name}
    cluster = ledger.cluster
    cluster.log_to_stderr(lambda: about)
    members = sharing_ranks(job, name, ranks)
    reply, operations = join(ledger, name)
    batches, start = job.make_batches(name, reply.position), (reply.step, reply.position)
    worker = job.make_worker(name, batches, start, process=cluster.process_id())
    cluster.log_to_stderr(lambda: {**about, "step": worker.step})
    log.info("Trains to step %d.", job.steps)
    reduction = make_reduction(job, worker, members, ranks.sums_on)
    steps_left = {other: job.steps - made for other, made in zip(job.workers, ranks.gather(worker.step), strict=True)}
    server = RankServer(job, worker, ledger, reduction, steps_left, operations)
    for _ in train_steps(worker, server, job.steps, in_flight=0):
        pass
    server.rest(worker)
    worker.answer_last_requests(server)


def join(ledger: LedgerConnection, worker: str) -> tuple[Reply, list[Operation]]:
    """Let this process join the group as a worker.

    Returns:
        The reply, which says where the worker begins, and the operations that its `RankServer` must carry out first.
    """
    cluster = ledger.cluster
    reply, operations = ledger.ask("join", worker, cluster.process_id(), cluster.this_actor())
    return reply, operations


def sharing_ranks(job: Job, name: str, ranks: Collectives) -> dict[str, Members]:
    """Return, for each group that a worker shares with other workers, the ranks of all its users."""
    made: dict[tuple[int, ...], Members] = {}
    found = {}
    for group in job.served():
        users = tuple(rank for rank, task in enumerate(job.workers.values()) if task in group.tasks)
        if len(users) > 1 and users not in made:
            made[users] = ranks.members(users)
        if len(users) > 1 and list(job.workers).index(name) in users:
            found[group.name] = made[users]
    return found


def make_reduction(
    job: Job, worker: TaskWorker, members: Mapping[str, Members], device: torch.device | None
) -> Reduction:
    """Return the reduction of a worker's gradients; its backward pass starts the buckets.

    Args:
        members: what `sharing_ranks` returned.
        device: holds the sums; None for the device of the gradients.
    """
    assert isinstance(job.spec.engine, AllreduceSpec)
    plan = plan_buckets({group.name: group.layout for group in job.served()}, job.spec.engine.bucket_mb)
    reduction = Reduction(plan, worker.gradients, members, device)
    reduction.watch(worker.learner.tensors())
    return reduction
