"""Engines `async`, `bounded` and `sync`: one actor per worker around parameter-server actors, and what heals them.

Source: Mudrakarta et al., "K for the Price of 1", ICLR 2019, section 5.3 (`async`); Ho et al., "More Effective
Distributed ML via a Stale Synchronous Parallel Parameter Server", NIPS 2013 (`bounded`).
"""

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from multitask.cluster.places import check_places
from multitask.cluster.session import ray_session
from multitask.engines.crew import Crew, actors, decoders
from multitask.engines.interface import Driver, Outcome, take
from multitask.engines.loss import ENDED, LOST, NotBegunError
from multitask.errors import TrainingError, failure
from multitask.job.job import Job
from multitask.server.messages import StepRecord
from multitask.server.parameter_server import CompleteSnapshot
from multitask.server.progress import Progress
from multitask.worker import Values

POLL_S = 0.5
RESTARTS_WITHOUT_A_STEP = 3
"""Times that a worker, or under `sync` the whole group, may be lost without a step made in between."""
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
                    session = ServedRun(crew, driver, outcome)
                    return session.run()
            except LostError as lost:
                losses = 1 if session.made_steps else losses + 1
                if losses > RESTARTS_WITHOUT_A_STEP:
                    raise TrainingError(f"{lost} It was lost {losses} times without a step made.") from None
                log.warning("%s All workers go back to %s.", lost, driver.store.where() or "the start")
                job = job.restored(driver.store.latest())


class ServedRun:
    """One crew's work, from its start to its end, or until it has to start again."""

    def __init__(self, crew: Crew, driver: Driver, outcome: Outcome) -> None:
        self._crew, self._job, self._driver, self._outcome = crew, crew.job, driver, outcome
        self._incarnations: list[int] = []
        self._restarts = dict.fromkeys(crew.job.workers, (0, -1))
        """Worker -> restarts without a step made in between, and its step at the last one."""
        self._steps = dict.fromkeys(crew.job.workers, 0)
        self._processes: dict[str, int] = {}
        """Worker -> the process that made its last step."""
        self._lost_processes: dict[str, int] = {}
        """The same at its last loss: of what such a process made, the driver may hear after that."""
        self._trained: set[str] = set()
        """Workers that have made their last step here."""
        self._unconfirmed: set[str] = set()
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
        self._incarnations = self._patiently(crew.server.ping.remote, begin=True)
        with decoders(job, nodes) as decoder_of:
            self._all("prepare", {name: (decoder_of.get(name),) for name in job.workers})
            self._all("train")
        while True:  # until nobody was lost on the way to the end
            steps = self._all("confirm_finished")
            self._outcome.paused = min(steps.values()) < job.spec.steps
            if self._outcome.paused:
                self._call("snapshot_for_checkpoint")
            self._all("answer_last_requests")
            if self._poll() and self._call("has_ended"):
                return self._outcome

    def _all(self, method: str, arguments: Mapping[str, tuple[Any, ...]] | None = None) -> dict[str, Any]:
        """Run a method of every worker to its end; a process that is lost meanwhile gets a successor."""
        crew, every = self._crew, ("prepare", "train", "confirm_finished", "answer_last_requests")
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
            self._calls |= self._confirm_again()
            if method == "train" and self._trained:
                self._calls |= {
                    crew.call(name, "answer_requests"): name for name in self._idle(self._call("workers_with_requests"))
                }
        return results

    def _confirm_again(self) -> dict["ray.ObjectRef[Any]", str]:
        """Others must not wait for a worker that has finished, of which a restored server does not know."""
        names = [name for name in self._job.workers if name in self._trained & self._unconfirmed]
        self._unconfirmed -= set(names)
        return {self._crew.call(name, "confirm_finished"): name for name in names}

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
        told = take(self._job, self._driver, self._outcome, news, self._snapshots)
        for version in news[1]:
            self._call("drop_snapshot", version)
        self._steps = {name: worker.step for name, worker in news[2].workers.items()}
        self.made_steps = self.made_steps or bool(news[0])
        for record in news[0]:
            self._outcome.back(ALL)
            self._processes[record.worker] = record.pid
            if record.pid != self._lost_processes.get(record.worker):
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
        for name in self._call("silent_workers", silent_s, set(self._calls.values())):
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
        incarnations = self._patiently(self._crew.server.ping.remote)
        others = [self._patiently(shard.ping.remote) for shard in self._crew.shards]
        if incarnations[1:] != others:
            self._lose("server", "A shard of the parameter server was lost.")
            ray.kill(self._crew.server, no_restart=False)
            incarnations = self._patiently(self._crew.server.ping.remote)
        if incarnations != self._incarnations:
            self._incarnations = incarnations
            self._lose("server", "The parameter server was lost.")
            if self._pausing:
                self._patiently(lambda: self._crew.server.call.remote("pause"))
            self._unconfirmed = set(self._job.workers)
            log.warning("The parameter server is back, at %s.", self._crew.store.where() or "the start")
        self._outcome.back("server")  # one that could not be reached may never have been away

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._patiently(lambda: self._crew.server.call.remote(method, *arguments))

    def _drain(self) -> tuple[list[StepRecord], dict[int, CompleteSnapshot], Progress]:
        number = next(self._numbers)
        return self._patiently(lambda: self._crew.server.drain.remote(number))

    def _snapshots(self, version: int) -> Values | None:
        """The values of a version put aside; None where the server was lost since."""
        return self._patiently(lambda: self._crew.server.snapshot.remote(version))

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
