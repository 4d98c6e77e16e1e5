"""What a trial needs against what the cluster has: a trial that finds no place would wait for ever, in silence."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from multitask.engines.places import chooses_places
from multitask.spec import JobSpec, LocalSpec, SpecError

DRIVER_CPUS = 0.01
"""Of a trial whose workers are actors of their own: its process only waits for them, and Ray refuses 0."""
Bundle = dict[str, float]
"""CPUs and GPUs that have to lie on one node."""


@dataclass(frozen=True)
class Places:
    """How the trials of a sweep share a cluster."""

    concurrent: int
    """Trials at a time."""
    specs: tuple[JobSpec, ...]
    """The trials' jobs, each with its share of the CPUs written in."""


def reserve(specs: Sequence[JobSpec], nodes: Sequence[Mapping[str, float]], concurrent: int | None) -> Places:
    """Find out how many trials run at a time, or that it cannot work.

    Args:
        specs: of all trials.
        nodes: what each node of the cluster has, CPU and GPU among it.
        concurrent: trials at a time; by default as many as find room.
    Raises:
        SpecError: they find no room; has the arithmetic, and what to change.
    """
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    asked = min(concurrent or 1, len(specs))
    shared = tuple(_with_share(spec, cpus, asked) for spec in specs)
    most = len(specs) if concurrent is None else asked
    rooms = [_trials_that_fit(needs(spec), nodes, most) for spec in shared]
    room = min(rooms)
    if room < asked:
        raise SpecError(_no_room(shared[rooms.index(room)], nodes, asked, room))
    return Places(room, shared)


def needs(spec: JobSpec) -> list[Bundle]:
    """What one trial takes of the cluster: its own process first, then each worker that is a process of its own."""
    resources = spec.resources
    gpus = {"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}
    if isinstance(spec.engine, LocalSpec):
        return [{"CPU": resources.cpus_per_worker or float(resources.threads_per_worker), **gpus}]
    assert resources.cpus_per_worker is not None, "`reserve` has set the share"
    workers = sum(task.workers for task in spec.tasks)
    return [{"CPU": DRIVER_CPUS}, *({"CPU": resources.cpus_per_worker, **gpus} for _ in range(workers))]


def reserved(spec: JobSpec) -> list[Bundle]:
    """What Tune reserves of it: Ray Train, and a run that chooses places, reserve those of the workers themselves."""
    by_itself = spec.engine.name == "allreduce" or chooses_places(spec)
    return needs(spec)[:1] if by_itself else needs(spec)


def _with_share(spec: JobSpec, cpus: float, concurrent: int) -> JobSpec:
    """Workers without a number of CPUs get an equal share of what the drivers leave, at most one, in hundredths."""
    if isinstance(spec.engine, LocalSpec) or spec.resources.cpus_per_worker is not None:
        return spec
    workers = sum(task.workers for task in spec.tasks)
    hundredths = math.floor(100 * (cpus - concurrent * DRIVER_CPUS) / (concurrent * workers) + 1e-9)
    share = min(1.0, max(1, hundredths) / 100)
    return replace(spec, resources=replace(spec.resources, cpus_per_worker=share))


def _trials_that_fit(bundles: Sequence[Bundle], nodes: Sequence[Mapping[str, float]], most: int) -> int:
    """Trials, up to `most`, whose bundles all find a node, each placed on the first that has room."""
    free = [dict(node) for node in nodes]
    largest_first = sorted(bundles, key=lambda bundle: (bundle.get("GPU", 0.0), bundle["CPU"]), reverse=True)
    for trial in range(most):
        for bundle in largest_first:
            node = next((node for node in free if _has(node, bundle)), None)
            if node is None:
                return trial
            for kind, amount in bundle.items():
                node[kind] -= amount
    return most


def _has(node: Mapping[str, float], bundle: Bundle) -> bool:
    return all(node.get(kind, 0.0) >= amount - 1e-9 for kind, amount in bundle.items())


def _total(bundles: Sequence[Bundle], kind: str) -> float:
    return sum(bundle.get(kind, 0.0) for bundle in bundles)


def _no_room(spec: JobSpec, nodes: Sequence[Mapping[str, float]], concurrent: int, room: int) -> str:
    bundles = needs(spec)
    own, workers = bundles[0]["CPU"], bundles[1:]
    total = _total(bundles, "CPU")
    sum_of_one = f"{own:g} for its own process + {len(workers)} workers x {workers[0]['CPU']:g} = " if workers else ""
    lines = [
        f"{concurrent} trial{'s' if concurrent > 1 else ''} at a time of engine {spec.engine.name}: one takes "
        f"{sum_of_one}{total:g} CPUs, together {concurrent * total:g}"
    ]
    if gpus := _total(bundles, "GPU"):
        lines[0] += f", and {gpus:g} GPUs each"
    has = ", ".join(" and ".join(f"{node.get(k, 0):g} {k}s" for k in ("CPU", "GPU") if node.get(k)) for node in nodes)
    lines.append(f"the cluster has {has} ({len(nodes)} node{'s' if len(nodes) > 1 else ''})")
    change = f"set concurrent: {room}" if room else "set resources.cpus_per_worker (or threads, GPUs) lower"
    return f"The sweep would wait for ever for places. {'; '.join(lines)}. Next: {change}, or use a larger cluster."
