"""Arithmetic that decides whether a cluster has room for all workers of a run, and explains why it has not."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

PARTS = 10_000
"""Smallest parts of a resource: Ray counts in ten-thousandths."""
SEARCH_S = 10.0
"""Time limit of the search for the best distribution of workers over nodes."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    resources: Mapping[str, float]
    """Amounts of its resources, including those in use."""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Demand:
    """A number of workers that ask for the same resources and labels."""

    name: str
    """Owner of the workers, with which an error message begins: `Task 'pets'`."""
    workers: int
    resources: Mapping[str, float]
    """Resources that each worker takes, with amounts above 0. All demands for GPUs have the same amount of them."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that a node needs to hold such a worker."""


def room(demands: Sequence[Demand], nodes: Sequence[Node]) -> int:
    """Return the largest number of these workers that the nodes hold at once if nothing else runs on them.

    The result may be too large, but never too small, if the demands differ in many ways and the search reaches its time
    limit.
    """
    demands = _merged(demands)
    most = np.array([[_most(demand, node) for node in nodes] for demand in demands], dtype=np.int64)
    workers = _workers(demands)
    if len(demands) == 1 or not nodes:
        return min(workers, int(most.sum()))
    return min(workers, _most_together(demands, nodes, most))


def fits(demands: Sequence[Demand], nodes: Sequence[Node]) -> bool:
    """Return whether the nodes hold all of these workers at once."""
    return not demands or room(demands, nodes) == _workers(demands)


def misfit(demands: Sequence[Demand], nodes: Sequence[Node]) -> str | None:
    """Explain in numbers why the nodes cannot hold all workers at once; None if they can.

    The text names only the demands that matter: it leaves out a demand if the others alone do not fit either.
    """
    if fits(demands, nodes):
        return None
    stuck = list(demands)
    for demand in demands:
        others = [other for other in stuck if other is not demand]
        if not fits(others, nodes):
            stuck = others
    shapes = Counter((_shape(stuck, node), room(stuck, [node])) for node in nodes)
    useful = sorted(shapes.items(), key=lambda shape: (-shape[0][1], shape[0][0]))
    have = [f"{_count(number, 'node')} with {shape} for {most}" for (shape, most), number in useful]
    needs = "; ".join(_needs(demand) for demand in stuck)
    where = ", ".join(have) or "it has no nodes"
    return f"{needs}. The cluster has room for {room(stuck, nodes)} of {_workers(stuck)}: {where}."


def _workers(demands: Sequence[Demand]) -> int:
    return sum(demand.workers for demand in demands)


def _merged(demands: Sequence[Demand]) -> list[Demand]:
    """Merge the demands of all tasks that ask for the same resources and labels."""
    merged: dict[tuple[frozenset[tuple[str, float]], frozenset[tuple[str, str]]], Demand] = {}
    for demand in demands:
        kind = frozenset(demand.resources.items()), frozenset(demand.labels.items())
        workers = demand.workers + (merged[kind].workers if kind in merged else 0)
        merged[kind] = Demand(demand.name, workers, demand.resources, demand.labels)
    return list(merged.values())


def _most(demand: Demand, node: Node) -> int:
    """Return how many workers of one demand a node holds."""
    if not demand.labels.items() <= node.labels.items():
        return 0
    return min(demand.workers, *(_times(name, node, amount) for name, amount in demand.resources.items()))


def _times(resource: str, node: Node, amount: float) -> int:
    """Return how many times a node has an amount of a resource. A share of a GPU has to be on one GPU."""
    has, takes = round(PARTS * node.resources.get(resource, 0.0)), max(1, round(PARTS * amount))
    if resource == "GPU" and takes < PARTS:
        return has // PARTS * (PARTS // takes)
    return has // takes


def _most_together(demands: Sequence[Demand], nodes: Sequence[Node], most: np.ndarray) -> int:
    """Return the largest number of workers that the nodes hold, by an integer program.

    Its variables are the numbers of workers of each demand on each node.

    Args:
        most: number of workers of each demand that each node holds alone, shape (demands, nodes).
    """
    # Imported here because few runs need it, and otherwise all processes of a run would load it.
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    each_node, each_demand = sparse.eye_array(len(nodes)), sparse.eye_array(len(demands))
    limits = [LinearConstraint(sparse.kron(each_demand, np.ones((1, len(nodes)))), ub=[d.workers for d in demands])]
    for name in sorted({name for demand in demands for name in demand.resources}):
        takes = np.array([[demand.resources.get(name, 0.0) for demand in demands]])
        has = np.array([node.resources.get(name, 0.0) for node in nodes])
        if name == "GPU":  # all shares are equal, so the number of workers per GPU is fixed
            has = np.array([_times(name, node, takes.max()) for node in nodes])
            takes = np.sign(takes)
        limits.append(LinearConstraint(sparse.kron(takes / takes.max(), each_node), ub=has / takes.max()))
    found = milp(
        -np.ones(most.size),
        integrality=np.ones(most.size),
        bounds=Bounds(0, most.ravel()),
        constraints=limits,
        options={"time_limit": SEARCH_S},
    )
    return int(min(most.sum(), 1e-6 - found.mip_dual_bound))


def _needs(demand: Demand) -> str:
    """Describe what a demand asks for."""
    amounts = ", ".join(f"{amount:g} {name}" for name, amount in demand.resources.items())
    where = ", ".join(f"{key}={value}" for key, value in demand.labels.items())
    return f"{demand.name} needs {_count(demand.workers, 'worker')} of {amounts}" + (
        f" on nodes labelled {where}" if where else ""
    )


def _shape(demands: Sequence[Demand], node: Node) -> str:
    """Describe what a node has of the resources and labels that the demands ask for."""
    names = dict.fromkeys(name for demand in demands for name in demand.resources)
    keys = dict.fromkeys(key for demand in demands for key in demand.labels if key in node.labels)
    amounts = [f"{node.resources.get(name, 0.0):g} {name}" for name in names]
    return ", ".join(amounts + [f"{key}={node.labels[key]}" for key in keys])


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
