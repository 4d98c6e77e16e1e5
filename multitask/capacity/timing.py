"""Measurement of the steps of a job's workers on this machine, without a server."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from math import ceil, sqrt
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from statistics import mean, median

import numpy as np
import torch

from multitask.capacity.costs import FLOAT_BYTES, SERVER_COSTS, ServerCosts
from multitask.capacity.estimate import Cluster, Deployment, Kind
from multitask.evaluation import torch_threads
from multitask.job.job import Job
from multitask.server.messages import Reply
from multitask.spec.errors import SpecError
from multitask.spec.schema import JobSpec, TaskSpec

WARM_UP, FEWEST, MOST = 2, 4, 12
"""Number of steps before the measurement, and smallest and largest number of steps that are timed."""
ENOUGH_S = 15.0
"""Time after which no further step is begun, once the smallest number of steps is timed."""
COPIES = 21
"""Number of copies whose median time counts."""
SMALLEST_COPY = 1 << 20
"""Smallest size of a timed copy in bytes."""
_barrier: Barrier | None = None
"""Barrier at which processes that time steps side by side wait for each other, so that none computes alone."""
UNCHANGED = Reply(version=0, rate=0.0)
"""A reply after which a worker keeps its values."""


def cores_here() -> int:
    """Return the number of cores of this machine."""
    return os.cpu_count() or 1


def time_deployment(
    spec: JobSpec, *, nodes: int, cores: float, network_gbit: float, costs: ServerCosts = SERVER_COSTS
) -> Deployment:
    """Time a few steps of a job on this machine, and describe the job on a cluster of such machines.

    As many workers compute at once as a node would have. The tables may stand in for others with more classes.

    Args:
        nodes, cores, network_gbit: as for `Cluster`.
        costs: the costs of a push at the server.
    Raises:
        SpecError: the engine is `local`, or the workers need a GPU and this machine has none.
    """
    _check(spec)
    # Feature caches are left out: every step then computes everything, as in the first epoch, and writes no file. Class
    # weights are left out too: a table that stands in may lack their names, and they cost no time.
    timed = replace(spec, tasks=tuple(replace(task, cache_features=None, class_weights="none") for task in spec.tasks))
    job = Job(timed, stand_ins=True)
    a_node = ceil(len(job.workers) / nodes)
    at_once = 1 if spec.resources.gpus_per_worker else min(a_node, cores_here() // spec.resources.threads_per_worker)
    kinds = time_kinds(job, max(1, at_once))
    copies = copy_bytes_per_s(max(kind.pushed_bytes for kind in kinds))
    return Deployment(kinds, spec.engine, Cluster(nodes, cores, network_gbit, copies), costs)


def _check(spec: JobSpec) -> None:
    if not spec.engine.uses_ray:
        raise SpecError(
            "engine.name is 'local', which runs all workers in one process. To plan for a cluster set it to async, "
            "bounded, sync or allreduce."
        )
    if spec.resources.gpus_per_worker and not torch.cuda.is_available():
        raise SpecError(
            f"resources.gpus_per_worker is {spec.resources.gpus_per_worker:g}, but torch finds no GPU here to time a "
            "step on. Plan on a machine like the cluster's nodes, or set it to 0."
        )


def time_kinds(job: Job, at_once: int) -> tuple[Kind, ...]:
    """Time one task of each kind. Tasks that differ only in their names and workers make equal steps.

    Args:
        at_once: number of equal workers that compute at the same time, because workers on a node share its memory,
            caches and clock rates.
    """
    alike: dict[tuple[str, int], list[TaskSpec]] = {}
    for task in job.spec.tasks:
        key = repr(replace(task, name="any", workers=1, min_workers=None)), job.pushed_bytes(task.name)
        alike.setdefault(key, []).append(task)
    return tuple(_time_kind(job, tasks, at_once) for tasks in alike.values())


def _time_kind(job: Job, tasks: list[TaskSpec], at_once: int) -> Kind:
    """Time the first of some tasks that make equal steps."""
    first = tasks[0]
    timed = _time_at_once(job, f"{first.name}/0", at_once)
    runs = [steps_s for steps_s, _ in timed]
    return Kind(
        tasks=tuple(task.name for task in tasks),
        workers=sum(task.workers for task in tasks),
        images=first.batch_size * first.accumulate,
        step_s=mean(step_s for steps_s in runs for step_s in steps_s),
        spread_s=spread(runs),
        cpu_s=mean(cpu_s for _, cpu_s in timed),
        pushed_bytes=job.pushed_bytes(first.name),
        trained_bytes=sum(FLOAT_BYTES * group.layout.pushed for group in job.groups_of(first.name).values()),
    )


def spread(runs: Sequence[Sequence[float]]) -> float:
    """Return the standard deviation of step times, computed from the differences of successive steps.

    This leaves out slow changes, such as those in the speed of a shared machine. They affect all workers alike, so no
    worker waits for another because of them.

    Args:
        runs: for each worker the seconds of its steps, in their order.
    Source: von Neumann et al., "The mean square successive difference", Annals of Math. Statistics 12 (1941).
    """
    return sqrt(mean((after - before) ** 2 / 2 for run in runs for before, after in pairwise(run)))


def _time_at_once(job: Job, worker: str, count: int) -> list[tuple[list[float], float]]:
    """Run `time_steps` in this many processes at once."""
    if count == 1:
        return [time_steps(job, worker)]
    spawn = get_context("spawn")
    with ProcessPoolExecutor(count, spawn, initializer=_meet_at, initargs=(spawn.Barrier(count),)) as pool:
        return [started.result() for started in [pool.submit(time_steps, job, worker) for _ in range(count)]]


def _meet_at(barrier: Barrier) -> None:
    """Set the barrier of this process, which times steps beside other processes."""
    global _barrier
    _barrier = barrier


def time_steps(job: Job, worker: str) -> tuple[list[float], float]:
    """Time a few steps of one worker.

    Returns:
        Seconds of each step, and mean core seconds of a step.
    """
    with torch_threads(job.spec.resources.threads_per_worker):
        made = job.make_worker(worker, job.make_batches(worker))

        def step() -> float:
            start = time.perf_counter()
            push, _, private = made.compute()
            made.absorb(push, private, UNCHANGED, {})
            return time.perf_counter() - start

        for _ in range(WARM_UP):
            step()
        if _barrier is not None:
            _barrier.wait(job.spec.resources.start_timeout_s)
        cpu_before = time.process_time()
        steps_s = [step() for _ in range(FEWEST)]
        while len(steps_s) < MOST and sum(steps_s) < ENOUGH_S:
            steps_s.append(step())
        return steps_s, (time.process_time() - cpu_before) / len(steps_s)


def copy_bytes_per_s(size: int) -> float:
    """Measure the bytes per second of copies from memory to memory.

    Args:
        size: bytes of a copy. It matters because small copies stay in the processor's caches.
    """
    source = np.ones(max(size, SMALLEST_COPY), np.uint8)
    target = np.zeros_like(source)
    target.fill(1)  # otherwise the first copy would also take the time of mapping new pages
    times = []
    for _ in range(COPIES):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return source.size / median(times)
