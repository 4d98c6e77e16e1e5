"""Engines `async`, `bounded` and `sync`: one actor per worker around parameter-server actors, and what heals them.

Source: Mudrakarta et al., "K for the Price of 1", ICLR 2019, section 5.3 (`async`); Ho et al., "More Effective
Distributed ML via a Stale Synchronous Parallel Parameter Server", NIPS 2013 (`bounded`).
"""

import contextlib
import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayTaskError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from multitask.checkpoint import CheckpointStore
from multitask.engines.actors import (
    ENDED,
    LOST,
    Actor,
    DecodeActor,
    NotBegunError,
    ServerActor,
    ShardActor,
    WorkerActor,
)
from multitask.engines.interface import Driver, Outcome, take
from multitask.engines.places import check_places, chooses_places, cluster_nodes, demands, reserve
from multitask.job import Job, make_rules, rank_of
from multitask.server.messages import StepRecord
from multitask.server.parameter_server import Completed
from multitask.server.progress import Progress
from multitask.worker import TrainingError, Values, failure

POLL_S = 0.5
RESTARTS_WITHOUT_A_STEP = 3
"""Times that a worker, or under `sync` the whole group, may be lost without a step made in between."""
RAY_STARTS = 3
"""Times that a Ray of the run's own is tried to start."""
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
ALL = "all workers"
Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


class LostError(RuntimeError):
    """A process is gone, and all have to go back to the last checkpoint together."""


def run(job: Job, driver: Driver) -> Outcome:
    """Train on the Ray cluster that this process is connected to, or on one started here for the run.

    Training starts when every task has the processes that it needs; workers beyond them are guests there, until there
    is a place for a process of their own. Under `async` and `bounded` a lost worker or server is replaced while the
    others go on; under `sync`, and while workers are starting, all start again from the last checkpoint.

    Raises:
        PlacementError: the cluster has no room for the workers that the run starts with.
        TrainingError: a worker failed (with its name, task, steps and traceback), workers found no place in time, or
            processes are lost again and again without a step made.
    """
    outcome = Outcome()
    losses = 0
    with ray_session():
        check_places(job.spec)
        while True:
            try:
                with actors(job, driver.store) as crew:
                    session = _Session(crew, driver, outcome)
                    return session.run()
            except LostError as lost:
                losses = 1 if session.made_steps else losses + 1
                if losses > RESTARTS_WITHOUT_A_STEP:
                    raise TrainingError(f"{lost} It was lost {losses} times without a step made.") from None
                log.warning("%s All workers go back to %s.", lost, driver.store.where() or "the start")
                job = job.restored(driver.store.latest())


class Crew:
    """The actors of a run."""

    def __init__(self, job: Job, store: CheckpointStore) -> None:
        self.job, self.store = job, store
        # Under `sync` a lost server takes everything back to the checkpoint, so there it is not started again alone.
        self.heals = not make_rules(job.spec).together
        restarts = {"num_cpus": 0, "max_restarts": -1 if self.heals else 0}
        self._demands = demands(job.spec, cluster_nodes())
        self._group = reserve(job.spec, self._demands)
        shard_class, server_class = ray.remote(ShardActor), ray.remote(ServerActor)
        self.shards: list[Actor] = [
            shard_class.options(**restarts, scheduling_strategy=self._place(number)).remote()
            for number in range(1, job.shards)
        ]
        self.server: Actor = server_class.options(**restarts, scheduling_strategy=self._place(0)).remote()
        self._worker_class: Any = ray.remote(WorkerActor)
        self.hosts = {
            name: f"{task}/{rank_of(name) % job.task(task).needed_workers}"
            for name, task in job.workers.items()
            if rank_of(name) >= job.task(task).needed_workers
        }
        """Worker that has no place from the start -> in whose process it is a guest until it has one."""
        self._placed = [name for name in job.workers if name not in self.hosts]
        self.incarnations = dict.fromkeys(job.workers, 0)
        self._shared_job = ray.put(job)
        self.workers = {name: self._start(self._shared_job, name, 0) for name in self._placed}
        """Worker -> its own process, for those that have one."""
        self._coming: dict[str, tuple[Actor, ray.ObjectRef[str]]] = {}
        """Guest -> the process that it is to have, and the node of that once it runs."""
        self._grown: dict[str, str] = {}
        """Worker that was a guest -> the node of its own process."""

    def _start(self, job: "ray.ObjectRef[Job]", name: str, incarnation: int) -> Actor:
        """A worker's process; another one that takes its place asks for the same."""
        task = self.job.task(self.job.workers[name])
        asked = self._demands[task.name].resources
        if name in self.hosts:  # its place is not one of those that were given out at the start
            spread = "DEFAULT" if self.job.spec.resources.placement == "pack" else "SPREAD"
            place: dict[str, Any] = {
                "scheduling_strategy": spread if chooses_places(self.job.spec) else None,
                "label_selector": task.labels or None,
            }
        else:
            guests = sum(host == name for host in self.hosts.values())
            place = {
                "scheduling_strategy": self._place(self.job.shards + self._placed.index(name)),
                "max_concurrency": 2 + guests if guests else 1,
            }
        starter = self._worker_class.options(
            num_cpus=asked["CPU"], num_gpus=asked.get("GPU", 0), resources=task.resources, **place
        )
        return starter.remote(job, name, incarnation, self.server, self.shards)

    def _place(self, number: int) -> Any:
        """A shard's place in the group, or a worker's, which come after them.

        Without one Ray looks for any; for the worker of a sweep's trial, which has CPUs, among the trial's own.
        """
        if self._group is not None and number < self._group.bundle_count:
            return PlacementGroupSchedulingStrategy(self._group, number)
        return "DEFAULT" if number < self.job.shards else None

    def begin(self) -> "ray.ObjectRef[None]":
        """Hand the server and its shards what the latest checkpoint has, or the start."""
        job = ray.put(self.job.restored(self.store.latest()))
        lives = [shard.begin.remote(job, number) for number, shard in enumerate(self.shards, start=1)]
        begun: ray.ObjectRef[None] = self.server.begin.remote(job, self.shards, *lives)
        return begun

    def process(self, name: str) -> Actor:
        """Where a worker is."""
        return self.workers[name if name in self.workers else self.hosts[name]]

    def call(self, name: str, method: str, *arguments: Any) -> "ray.ObjectRef[Any]":
        """Call a worker, wherever it is."""
        call: ray.ObjectRef[Any]
        if name in self.workers:
            call = getattr(self.workers[name], method).remote(*arguments)
        else:
            call = self.process(name).host.remote(name, self.incarnations[name], method, *arguments)
        return call

    def together(self, name: str) -> list[str]:
        """All workers in the process of one."""
        process = self.process(name)
        return [other for other in self.job.workers if self.process(other) == process]

    def replace(self, name: str) -> list[str]:
        """Where the process of a worker is lost, start another one, from the latest checkpoint, unless its worker can
        be a guest again.

        Returns:
            The workers that go on elsewhere: those that were in the lost process, and one that made room for another.
        """
        lost = self.together(name)
        needed = [other for other in lost if other not in self.hosts]
        moved = lost + (self._dispensable(lost) if needed else [])
        for process in {self.process(other) for other in moved}:
            ray.kill(process)
        for other in moved:
            self.incarnations[other] += 1
            self.workers.pop(other, None)
            self._grown.pop(other, None)
        for other in needed:
            job = ray.put(self.job.restored(self.store.latest()))
            self.workers[other] = self._start(job, other, self.incarnations[other])
        return moved

    def _dispensable(self, lost: Collection[str]) -> list[str]:
        """Who makes room, one of the same task if possible: nodes may be too few now for it and one that is needed."""
        tasks = {self.job.workers[name] for name in lost}
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        grown = [name for name, node in self._grown.items() if node in alive and name not in lost]
        return sorted(grown, key=lambda name: self.job.workers[name] in tasks)[-1:]

    def grow(self, names: Collection[str]) -> dict[str, str]:
        """Let Ray look for a place for each guest among these workers, and for no other (an autoscaler acts on it), and
        give those for which a process runs to it. Their hosts make no more steps of them.

        Returns:
            Worker that has its own process now -> Ray's name of the node.
        """
        for name in self._coming.keys() - set(names):
            ray.kill(self._coming.pop(name)[0])
        moved: dict[str, str] = {}
        for name in [name for name in self.hosts if name in names and name not in self.workers]:
            if name not in self._coming:
                actor = self._start(self._shared_job, name, self.incarnations[name] + 1)
                self._coming[name] = actor, actor.node.remote()
            actor, node = self._coming[name]
            if not ray.wait([node], timeout=0)[0]:
                continue
            del self._coming[name]
            with contextlib.suppress(*ENDED):  # lost while it started; another one is asked for the next time
                moved[name] = self._grown[name] = ray.get(node)
                self.process(name).dismiss.remote(name)
                self.workers[name] = actor
                self.incarnations[name] += 1
        return moved

    def end(self) -> None:
        self.grow(())
        for actor in (*self.workers.values(), self.server, *self.shards):
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)


@contextlib.contextmanager
def actors(job: Job, store: CheckpointStore) -> Iterator[Crew]:
    """The server and all workers as actors, ended with the block."""
    crew = Crew(job, store)
    try:
        yield crew
    finally:
        crew.end()


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """Ray for a run: the session that exists, the cluster that RAY_ADDRESS names, or one in this process."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        # Ray would keep up to a hundred objects that nobody needs any more for a second, and meanwhile put gradients
        # and values into memory never touched before, with a page fault for every 4 KiB.
        os.environ.setdefault("RAY_free_objects_batch_size", "1")
        start_ray()
    else:
        ray.init(address=address, **QUIET)
    try:
        yield
    finally:
        ray.shutdown()


def start_ray(**options: Any) -> None:
    """Start Ray on this machine, again where it fails: it gives its own processes half a minute, which is little where
    others keep the machine busy.

    Args:
        options: of `ray.init`.
    """
    for tries_left in reversed(range(RAY_STARTS)):
        try:
            ray.init(address="local", include_dashboard=False, **QUIET, **options)
            break
        except Exception as error:  # of no type of its own
            ray.shutdown()
            if not tries_left:
                raise
            log.warning("Ray did not start on this machine; it is tried again. (%s)", error)


@contextlib.contextmanager
def decoders(job: Job, nodes: Mapping[str, str]) -> Iterator[dict[str, Actor]]:
    """Worker -> the actor that decodes for it, where workers on one node read the same rows; ended with the block.

    Args:
        nodes: worker -> Ray's name of its node.
    """
    shared_job = ray.put(job)
    decoder_of: dict[str, Actor] = {}
    for node in set(nodes.values()):
        for readers in job.sharing(name for name in job.workers if nodes[name] == node):
            if len(readers) > 1:
                here = NodeAffinitySchedulingStrategy(node, soft=False)
                actor: Any = ray.remote(DecodeActor).options(num_cpus=0, scheduling_strategy=here)
                decoder_of |= dict.fromkeys(readers, actor.remote(shared_job, readers))
    try:
        yield decoder_of
    finally:
        for decoder in set(decoder_of.values()):
            ray.kill(decoder)


class _Session:
    """One crew's work, from its start to its end, or until it has to start again."""

    def __init__(self, crew: Crew, driver: Driver, outcome: Outcome) -> None:
        self._crew, self._job, self._driver, self._outcome = crew, crew.job, driver, outcome
        self._lives: list[int] = []
        self._restarts = dict.fromkeys(crew.job.workers, (0, -1))
        """Worker -> restarts without a step made in between, and its step at the last one."""
        self._steps = dict.fromkeys(crew.job.workers, 0)
        self._processes: dict[str, int] = {}
        """Worker -> the process that made its last step."""
        self._lost_processes: dict[str, int] = {}
        """The same at its last loss: of what such a process made, the driver may hear after that."""
        self._trained: set[str] = set()
        """Workers that have made their last step here."""
        self._unsettled: set[str] = set()
        """Workers that may have said so to a server that is lost."""
        self._calls: dict[ray.ObjectRef[Any], str] = {}
        """Calls of workers that are not answered yet."""
        self._pausing = False
        self._numbers = itertools.count(1)
        """Of what is drained from the server."""
        self.made_steps = False

    def run(self) -> Outcome:
        job, crew = self._job, self._crew
        nodes = await_start(job, {name: crew.call(name, "node") for name in job.workers})
        for name, node in nodes.items():
            log.info("Started on node %s.", node, extra=self._about(name))
        self._lives = self._patiently(crew.server.ping.remote, begin=True)
        with decoders(job, nodes) as decoder_of:
            self._all("prepare", {name: (decoder_of.get(name),) for name in job.workers})
            self._all("train")
        while True:  # until nobody was lost on the way to the end
            steps = self._all("settle")
            self._outcome.paused = min(steps.values()) < job.spec.steps
            if self._outcome.paused:
                self._call("put_aside")
            self._all("complete")
            if self._poll() and self._call("has_ended"):
                return self._outcome

    def _all(self, method: str, arguments: Mapping[str, tuple[Any, ...]] | None = None) -> dict[str, Any]:
        """Run a method of every worker to its end; a process that is lost meanwhile gets a successor."""
        crew, every = self._crew, ("prepare", "train", "settle", "complete")
        phases = every[: every.index(method) + 1]
        self._calls |= {crew.call(name, method, *(arguments or {}).get(name, ())): name for name in self._job.workers}
        results = {}
        while self._calls:
            done, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=POLL_S)
            moved: list[str] = []
            for call in done:
                name = self._calls.pop(call)
                if name in moved:  # lost with another's process
                    continue
                try:
                    results[name] = ray.get(call)
                    self._trained |= {name} if method != "prepare" else set()
                    self._outcome.back(name)
                except RayTaskError as error:
                    self._poll()  # what led there is worth knowing, and a checkpoint may be complete
                    why = f"{error.cause}\n{error}"
                    raise failure(name, self._job.workers[name], self._steps[name], why) from None
                except ENDED as error:
                    moved += self._replace(name, str(error))
            moved += self._grow(set(self._calls.values()) - self._trained if method == "train" else ())
            self._calls = {call: name for call, name in self._calls.items() if name not in moved}
            self._calls |= {crew.call(name, "catch_up", phases): name for name in moved}
            self._poll()
            self._calls |= self._settle_again()
            if method == "train" and self._trained:
                self._calls |= {crew.call(name, "answer_cuts"): name for name in self._idle(self._call("owing"))}
        return results

    def _settle_again(self) -> dict["ray.ObjectRef[Any]", str]:
        """Others must not wait for a worker that has finished, of which a restored server does not know."""
        names = [name for name in self._job.workers if name in self._trained & self._unsettled]
        self._unsettled -= set(names)
        return {self._crew.call(name, "settle"): name for name in names}

    def _idle(self, names: Iterable[str]) -> list[str]:
        """Those of the workers that have made their last step, and of which nothing is asked."""
        busy = set(self._calls.values())
        return [name for name in names if name in self._trained and name not in busy]

    def _grow(self, training: Collection[str]) -> Collection[str]:
        """Guests among workers that train which go on in a process of their own now.

        None is looked for while a worker that was lost waits for a place.
        """
        moved = self._crew.grow(() if self._outcome.lost_at or self._pausing else training)
        for name, node in moved.items():
            log.info("Started on node %s.", node, extra=self._about(name))
        return moved

    def _poll(self) -> bool:
        """Tell the driver what happened; look after the server and after workers that hang.

        Returns:
            Everything that the server gave out could be told.
        """
        self._watch_server()
        news = self._drain()
        told = take(self._job, self._driver, self._outcome, news, self._kept)
        for version in news[1]:
            self._call("release", version)
        self._steps = {name: worker.step for name, worker in news[2].workers.items()}
        self.made_steps = self.made_steps or bool(news[0])
        for record in news[0]:
            self._outcome.back(ALL)
            self._processes[record.worker] = record.process
            if record.process != self._lost_processes.get(record.worker):
                self._outcome.back(record.worker)
        if self._driver.wants_pause() and not self._pausing:
            self._pausing = True
            self._call("pause")
        self._end_what_hangs()
        self._check_places()
        return told

    def _end_what_hangs(self) -> None:
        """One that shares its process waits until the others there have had their turns."""
        turns = max(Counter(map(self._crew.process, self._job.workers)).values())
        silent_s = turns * self._job.spec.resources.step_timeout_s
        for name in self._call("silent", silent_s, set(self._calls.values())):
            if name not in self._outcome.lost_at:
                message = "%s made no step for %g s; its process is ended."
                log.warning(message, self._who(name), silent_s, extra=self._about(name))
                ray.kill(self._crew.process(name))

    def _check_places(self) -> None:
        """Successors find no place where the cluster has become too small."""
        timeout_s, now = self._job.spec.resources.start_timeout_s, time.monotonic()
        late = [name for name in self._job.workers if now - self._outcome.lost_at.get(name, now) > timeout_s]
        if late:
            raise not_started(self._job, late)

    def _watch_server(self) -> None:
        """A shard that was started again holds older values than the others: then all go back together."""
        lives = self._patiently(self._crew.server.ping.remote)
        others = [self._patiently(shard.ping.remote) for shard in self._crew.shards]
        if lives[1:] != others:
            self._lose("server", "A shard of the parameter server was lost.")
            ray.kill(self._crew.server, no_restart=False)
            lives = self._patiently(self._crew.server.ping.remote)
        if lives != self._lives:
            self._lives = lives
            self._lose("server", "The parameter server was lost.")
            if self._pausing:
                self._patiently(lambda: self._crew.server.call.remote("pause"))
            self._unsettled = set(self._job.workers)
            log.warning("The parameter server is back, at %s.", self._crew.store.where() or "the start")
        self._outcome.back("server")  # one that could not be reached may never have been away

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._patiently(lambda: self._crew.server.call.remote(method, *arguments))

    def _drain(self) -> tuple[list[StepRecord], dict[int, Completed], Progress]:
        number = next(self._numbers)
        return self._patiently(lambda: self._crew.server.drain.remote(number))

    def _kept(self, version: int) -> Values | None:
        """The values of a version put aside; None where the server was lost since."""
        return self._patiently(lambda: self._crew.server.kept.remote(version))

    def _patiently(self, send: Callable[[], "ray.ObjectRef[Answer]"], begin: bool = False) -> Answer:
        """Ask the server, until it is back where it was lost.

        Args:
            begin: it is to begin before it is asked.
        """
        timeout_s = self._job.spec.resources.start_timeout_s
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if begin:
                    ray.get(self._crew.begin(), timeout=timeout_s)
                    begin = False
                return ray.get(send(), timeout=timeout_s)
            except LOST as error:
                begin = begin or isinstance(error, NotBegunError)
                self._lose("server", f"The parameter server was lost: {error}")
                if time.monotonic() > deadline:
                    raise TrainingError(f"The parameter server did not come back within {timeout_s:g} s.") from None
                time.sleep(POLL_S)
            except GetTimeoutError:
                raise TrainingError(f"The parameter server did not answer within {timeout_s:g} s.") from None

    def _replace(self, name: str, reason: str) -> list[str]:
        """Give a worker another process; returns all workers that go on elsewhere now."""
        self._lose(name, f"{self._who(name)} was lost: {reason}")
        for other in self._crew.together(name):
            restarts, step = self._restarts[other]
            restarts = restarts + 1 if self._steps[other] <= step else 1
            self._restarts[other] = restarts, self._steps[other]
            if restarts > RESTARTS_WITHOUT_A_STEP:
                raise TrainingError(
                    f"{self._who(other)} was lost {restarts} times without a step made after step {step}: {reason}",
                    self._about(other),
                )
        message = "%s was lost; another process goes on from its last checkpoint."
        log.warning(message, self._who(name), extra=self._about(name))
        moved = self._crew.replace(name)
        for other in moved:
            self._outcome.lose(other)
            self._lost_processes[other] = self._processes.get(other, 0)
        self._trained -= set(moved)
        return moved

    def _lose(self, what: str, message: str) -> None:
        self._outcome.lose(what if self._crew.heals else ALL)
        if not self._crew.heals:
            raise LostError(message.splitlines()[0])

    def _who(self, worker: str) -> str:
        return f"Worker '{worker}' of task '{self._job.workers[worker]}'"

    def _about(self, worker: str) -> dict[str, object]:
        return {"task": self._job.workers[worker], "worker": worker, "step": self._steps[worker]}


def await_start(job: Job, starts: Mapping[str, "ray.ObjectRef[str]"]) -> dict[str, str]:
    """Worker -> Ray's name of its node.

    Raises:
        TrainingError: some did not start in time; says who.
        LostError: one has started, and is gone.
    """
    timeout_s = job.spec.resources.start_timeout_s
    _, missing = ray.wait(list(starts.values()), num_returns=len(starts), timeout=timeout_s)
    if missing:
        raise not_started(job, [name for name, start in starts.items() if start in missing])
    try:
        return {name: ray.get(start) for name, start in starts.items()}
    except ENDED as error:  # a node may go with what was to start there
        raise LostError(f"A worker was lost while it started: {error}".splitlines()[0]) from None


def not_started(job: Job, late: list[str]) -> TrainingError:
    return TrainingError(
        f"Workers {late} did not start within {job.spec.resources.start_timeout_s:g} s. The cluster has "
        f"{ray.cluster_resources()}, of which {ray.available_resources()} is free. Stop other jobs, or lower "
        "resources.cpus_per_worker or resources.gpus_per_worker."
    )
