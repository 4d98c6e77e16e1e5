"""Where the processes of a run go on a Ray cluster: what each asks for, and whether it can be had."""

import logging
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Sequence

import ray
from ray.util.placement_group import PlacementGroup, placement_group

from multitask.cluster.arithmetic import Demand, Node, fits, misfit
from multitask.errors import TrainingError
from multitask.spec.schema import JobSpec, LocalSpec

log = logging.getLogger(__name__)


class PlacementError(TrainingError):
    """Workers for which the cluster has no room, whoever else runs there; the message has the arithmetic."""


def check_places(spec: JobSpec) -> None:
    """Look whether the cluster could hold the workers that a run starts with, before any is started.

    On a cluster that the run joins nodes may still come, so it only warns; `resources.start_timeout_s` limits the wait.

    Raises:
        PlacementError: it could not, and no node will come.
    """
    if isinstance(spec.engine, LocalSpec):
        return
    nodes = cluster_nodes()
    problem = misfit(list(demands(spec, nodes).values()), nodes)
    if problem is None:
        return
    if os.environ.get("RAY_ADDRESS", "local") != "local":
        log.warning("%s Waiting up to %g s for nodes.", problem, spec.resources.start_timeout_s)
        return
    raise PlacementError(
        f"{problem} Add nodes, take fewer workers or lower what each of them takes (resources.cpus_per_worker, "
        "resources.gpus_per_worker, the tasks' resources and labels)."
    )


def cluster_nodes() -> list[Node]:
    return [Node(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]


def demands(spec: JobSpec, nodes: Sequence[Node]) -> dict[str, Demand]:
    """Task -> the workers that it starts with, and what each of its workers asks for."""
    cpus = spec.resources.cpus_per_worker
    if cpus is None:
        workers = sum(task.workers for task in spec.tasks)
        cpus = share(workers, nodes, lambda cpus: list(_demands(spec, cpus).values()))
    return _demands(spec, cpus)


def share(workers: int, nodes: Sequence[Node], demands: Callable[[float], Sequence[Demand]]) -> float:
    """CPUs of each worker: an equal share of all, or as much less, in hundredths, as lets every worker find room.

    Args:
        demands: what is asked for where each worker has so many CPUs.
    """
    equal = round(100 * equal_share(sum(node.resources.get("CPU", 0.0) for node in nodes) or 1.0, workers))

    def too_much(hundredths: int) -> bool:
        return not fits(demands(hundredths / 100), nodes)

    # Where not even the smallest share fits, CPUs are not what is missing.
    return (bisect_left(range(1, equal + 1), True, key=too_much) or equal) / 100


def equal_share(cpus: float, workers: int) -> float:
    """CPUs of each worker, rounded down to hundredths, at most one."""
    return min(1.0, max(0.01, math.floor(100 * cpus / workers) / 100))


def chooses_places(spec: JobSpec) -> bool:
    """Whether a run keeps places for its workers, rather than let Ray find one for each."""
    return spec.resources.placement is not None or any(task.resources or task.labels for task in spec.tasks)


def reserve(spec: JobSpec, workers: dict[str, Demand]) -> PlacementGroup | None:
    """Places for the server's shards, and after them for the workers that a run starts with, in the order of the job;
    given out all at once.

    Without a `placement` and demands of tasks, workers need none (Ray finds one for each by itself), nor does a single
    shard.
    """
    shards = getattr(spec.engine, "shards", 1)
    # A trace of memory: a bundle has to ask for something, and the server's CPU time is small and comes in bursts.
    bundles: list[tuple[dict[str, float], dict[str, str]]] = [({"memory": 1.0}, {})] * shards
    if chooses_places(spec):
        for demand in workers.values():
            # Ray gives places to large bundles first, whatever their labels. More than a server's trace of memory
            # brings those that can go to few nodes before those that can go anywhere.
            trace = {"memory": 1.0 + len(demand.labels)} if demand.labels else {}
            bundles += [({**demand.resources, **trace}, dict(demand.labels))] * demand.workers
    elif shards == 1:
        return None
    resources, labels = zip(*bundles, strict=True)
    strategy = "PACK" if spec.resources.placement == "pack" else "SPREAD"
    return placement_group(list(resources), strategy=strategy, bundle_label_selector=list(labels))


def _demands(spec: JobSpec, cpus: float) -> dict[str, Demand]:
    gpus = {"GPU": spec.resources.gpus_per_worker} if spec.resources.gpus_per_worker else {}
    return {
        task.name: Demand(
            f"Task '{task.name}'", task.needed_workers, {"CPU": cpus, **gpus, **task.resources}, task.labels
        )
        for task in spec.tasks
    }
