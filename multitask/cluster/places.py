"""Places for the processes of a run on a Ray cluster: what each process asks for, and whether the cluster has it."""

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

from multitask.cluster.arithmetic import Demand, Node, fits, misfit
from multitask.cluster.interface import Cluster, Reserved
from multitask.errors import TrainingError
from multitask.spec.schema import JobSpec

log = logging.getLogger(__name__)


class PlacementError(TrainingError):
    """The cluster has no room for a run's workers, even if nothing else runs on it. The message has the numbers."""


def check_places(cluster: Cluster, spec: JobSpec) -> None:
    """Check that the cluster has room for the workers that a run starts with, before any of them is started.

    An existing cluster may still get nodes. A lack of room is then only a warning, and `resources.start_timeout_s`
    limits the wait.

    Raises:
        PlacementError: the cluster has too little room, and will get no nodes.
    """
    if not spec.engine.uses_ray:
        return
    nodes = list(cluster.nodes().values())
    problem = misfit(list(demands(spec, nodes).values()), nodes)
    if problem is None:
        return
    if cluster.can_grow():
        log.warning("%s Waiting up to %g s for nodes.", problem, spec.resources.start_timeout_s)
        return
    raise PlacementError(
        f"{problem} Add nodes, take fewer workers or lower what each of them takes (resources.cpus_per_worker, "
        "resources.gpus_per_worker, the tasks' resources and labels)."
    )


def demands(spec: JobSpec, nodes: Sequence[Node]) -> dict[str, Demand]:
    """Return for each task the number of workers that it starts with, and the resources that each of them asks for."""
    cpus = spec.resources.cpus_per_worker
    if cpus is None:
        workers = sum(task.workers for task in spec.tasks)
        cpus = share(workers, nodes, lambda cpus: list(_demands(spec, cpus).values()))
    return _demands(spec, cpus)


def share(workers: int, nodes: Sequence[Node], demands: Callable[[float], Sequence[Demand]]) -> float:
    """Return the CPUs of each worker: an equal share of all CPUs, lowered in hundredths until every worker has room.

    Args:
        workers: number of workers that share the CPUs.
        demands: returns the demands of all workers for a number of CPUs of each worker.
    """
    equal = round(100 * equal_share(sum(node.resources.get("CPU", 0.0) for node in nodes) or 1.0, workers))

    def too_much(hundredths: int) -> bool:
        return not fits(demands(hundredths / 100), nodes)

    # If not even the smallest share fits, something other than CPUs is missing.
    return (bisect_left(range(1, equal + 1), True, key=too_much) or equal) / 100


def equal_share(cpus: float, workers: int) -> float:
    """Return an equal share of CPUs for each worker, rounded down to hundredths, at least 0.01 and at most 1."""
    return min(1.0, max(0.01, math.floor(100 * cpus / workers) / 100))


def chooses_places(spec: JobSpec) -> bool:
    """Return whether a run reserves places for its workers. Otherwise Ray finds a place for each worker separately."""
    return spec.resources.placement is not None or any(task.resources or task.labels for task in spec.tasks)


def reserve(cluster: Cluster, spec: JobSpec, workers: Mapping[str, Demand]) -> list[Reserved]:
    """Reserve places for the server's shards and for the workers that a run starts with, all at once.

    The shards come first, and then the workers in the order of the job. Workers get no places here if the spec has no
    `placement` and the tasks have no `resources` or `labels`, because Ray then finds a place for each worker. In that
    case a single shard gets no place either.

    Args:
        workers: task -> the demand of the workers that it starts with.
    Returns:
        The places; an empty list if none are needed.
    """
    shards = spec.engine.shards
    # A bundle has to ask for something. A byte of memory will do: the server needs little CPU time, in short bursts.
    bundles: list[tuple[dict[str, float], dict[str, str]]] = [({"memory": 1.0}, {})] * shards
    if chooses_places(spec):
        for demand in workers.values():
            # Ray places large bundles first and does not consider their labels. Some more bytes of memory make it place
            # a bundle with labels, which fits on few nodes, before bundles that fit on any node.
            trace = {"memory": 1.0 + len(demand.labels)} if demand.labels else {}
            bundles += [({**demand.resources, **trace}, dict(demand.labels))] * demand.workers
    elif shards == 1:
        return []
    resources, labels = zip(*bundles, strict=True)
    places = cluster.reserve(resources, labels, spread=spec.resources.placement != "pack")
    return [Reserved(places, number) for number in range(len(bundles))]


def _demands(spec: JobSpec, cpus: float) -> dict[str, Demand]:
    gpus = {"GPU": spec.resources.gpus_per_worker} if spec.resources.gpus_per_worker else {}
    return {
        task.name: Demand(
            f"Task '{task.name}'", task.needed_workers, {"CPU": cpus, **gpus, **task.resources}, task.labels
        )
        for task in spec.tasks
    }
