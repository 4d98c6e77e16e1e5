"""Compares what trials need with what the cluster has: a trial without a place would wait for ever in silence."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from multitask.cluster.arithmetic import Demand, Node, fits, misfit
from multitask.cluster.places import chooses_places, demands, share
from multitask.spec.errors import SpecError
from multitask.spec.schema import JobSpec

DRIVER_CPUS = 0.01
"""CPUs of a trial's own process if its workers are other processes: it only waits for them, and Ray refuses 0."""
Bundle = dict[str, float]
"""Resources that have to be on one node."""


@dataclass
class Places:
    """The way in which the trials of a sweep share a cluster."""

    nodes: Sequence[Node]
    asked: int
    """Number of concurrent trials among which the CPUs are divided."""
    concurrent: int
    """Number of concurrent trials; larger than `asked` if there is room for more."""
    _shares: dict[str, float] = field(default_factory=dict, init=False)

    def placed(self, spec: JobSpec) -> JobSpec:
        """Return a trial's job with its workers' share of the CPUs.

        Raises:
            SpecError: there is no room for `concurrent` trials of this kind.
        """
        spec = self.with_share(spec)
        if not fits(_demands(spec, self.concurrent), self.nodes):
            raise self.no_room(spec, self.concurrent)
        return spec

    def with_share(self, spec: JobSpec) -> JobSpec:
        """Return a job whose workers have a number of CPUs: the spec's, or an equal share of those that are left."""
        if not spec.engine.uses_ray or spec.resources.cpus_per_worker is not None:
            return spec
        kind = repr(_demands(_with_cpus(spec, 1.0), 1))  # key of the cache: most trials of a sweep need the same
        if kind not in self._shares:
            workers = self.asked * sum(task.workers for task in spec.tasks)
            self._shares[kind] = share(workers, self.nodes, lambda cpus: _demands(_with_cpus(spec, cpus), self.asked))
        return _with_cpus(spec, self._shares[kind])

    def room(self, spec: JobSpec, most: int) -> int:
        """Return how many trials with this job the nodes can hold at once, at most `most`."""
        return bisect_left(range(1, most + 1), True, key=lambda trials: not fits(_demands(spec, trials), self.nodes))

    def no_room(self, spec: JobSpec, trials: int) -> SpecError:
        """Return the error that says what is missing for this number of concurrent trials, and what to change."""
        room = self.room(spec, trials)
        lower = "Lower what a trial takes (resources, and the tasks' workers, resources and labels)"
        change = f"Set concurrent: {room}" if room else lower
        return SpecError(
            f"The sweep would wait for ever for places for {trials} trial{'s' if trials > 1 else ''} at a time. "
            f"{misfit(_demands(spec, trials), self.nodes)} {change}, or use a larger cluster."
        )


def reserve(specs: Sequence[JobSpec], nodes: Sequence[Node], concurrent: int | None, trials: int) -> Places:
    """Find out how many trials can run at a time.

    Args:
        specs: job specs of all trials, or of trials that show everything that a trial may need.
        nodes: nodes of the cluster.
        concurrent: number of concurrent trials that the sweep asks for; by default as many as have room.
        trials: number of trials of the sweep.
    Raises:
        SpecError: there is no room; the message has the numbers and says what to change.
    """
    asked = min(concurrent or 1, trials)
    places = Places(nodes, asked, asked)
    most = trials if concurrent is None else asked
    kinds = {repr(_demands(spec, 1)): spec for spec in map(places.with_share, specs)}.values()
    rooms = [(places.room(spec, most), spec) for spec in kinds]
    places.concurrent, largest = min(rooms, key=lambda found: found[0])
    if places.concurrent < asked:
        raise places.no_room(largest, asked)
    return places


def reserved(spec: JobSpec) -> list[Bundle]:
    """Return what Tune reserves for a trial: its own process first, then each worker that is a process of its own.

    The workers are left out if Ray Train, or a run that chooses places, reserves the workers' places itself.
    """
    bundles = [dict(demand.resources) for demand in _demands(spec, 1) for _ in range(demand.workers)]
    by_itself = spec.engine.worker_group or chooses_places(spec)
    return bundles[:1] if by_itself else bundles


def _demands(spec: JobSpec, trials: int) -> list[Demand]:
    """Return what this number of concurrent trials takes; workers in processes of their own need `cpus_per_worker`."""
    resources = spec.resources
    if not spec.engine.uses_ray:
        gpus = {"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}
        cpus = resources.cpus_per_worker or float(resources.threads_per_worker)
        return [Demand("Engine local", trials, {"CPU": cpus, **gpus})]
    assert resources.cpus_per_worker is not None
    workers = [replace(demand, workers=trials * demand.workers) for demand in demands(spec, ()).values()]
    return [Demand("The trial's own process", trials, {"CPU": DRIVER_CPUS}), *workers]


def _with_cpus(spec: JobSpec, cpus: float) -> JobSpec:
    return replace(spec, resources=replace(spec.resources, cpus_per_worker=cpus))
