"""Engines `async`, `bounded` and `sync`: one actor per worker around parameter-server actors.

Source: Mudrakarta et al., "K for the Price of 1", ICLR 2019, section 5.3 (`async`); Ho et al., "More Effective
Distributed ML via a Stale Synchronous Parallel Parameter Server", NIPS 2013 (`bounded`).
"""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray.exceptions import RayTaskError

from multitask.cluster.interface import Cluster, Ref
from multitask.cluster.places import check_places
from multitask.engines.caller import POLL_S
from multitask.engines.crew import Crew, actors
from multitask.engines.decisions import (
    LossCounter,
    WorkerStatus,
    guests_to_place,
    hanging_workers,
    idle_workers,
    is_back,
    is_paused,
    overdue_workers,
    silence_limit_s,
    workers_to_confirm,
)
from multitask.engines.decoding import decoders
from multitask.engines.interface import WHOLE_RUN, Driver, Outcome, take
from multitask.engines.loss import ENDED, RestartAllError, start_timeout
from multitask.engines.server_client import ServerClient
from multitask.errors import TrainingError, failure
from multitask.job.job import Job
from multitask.server.messages import StepRecord
from multitask.server.progress import Progress

PHASES = ("prepare", "train", "confirm_finished", "answer_last_requests")
"""Methods of a worker, in the order in which every worker runs them."""

log = logging.getLogger(__name__)


def run(job: Job, driver: Driver) -> Outcome:
    """Train on the Ray cluster that this process is connected to, or on one started here for the run.

    Training starts when every task has the processes that it needs. The other workers are guests in these processes
    until there is room for a process of their own. Under `async` and `bounded` a lost worker or server is replaced
    while the others go on. Under `sync`, and while workers are starting, all processes start again from the latest
    checkpoint.

    Raises:
        PlacementError: the cluster has no room for the workers that the run starts with.
        TrainingError: a worker failed (with its name, task, steps and traceback), workers found no place in time, or
            processes are lost again and again without a step made.
    """
    cluster = driver.cluster
    outcome, losses, records = Outcome(cluster.clock), LossCounter(), 0
    with cluster.session():
        check_places(cluster, job.spec)
        while True:
            try:
                with actors(cluster, job, driver.store) as crew:
                    attempt = ServedRun(crew, ServerClient(crew, outcome), driver, outcome)
                    return attempt.run()
            except RestartAllError as lost:
                records += attempt.records
                loss = losses.add(WHOLE_RUN, records)
                if loss.too_often:
                    raise TrainingError(f"{lost} It was lost {loss.count} times without a step made.") from None
                log.warning("%s All workers go back to %s.", lost, driver.store.where() or "the start")
                job = job.restored(driver.store.latest())


class ServedRun:
    """Leads one crew from its start to the end of the run, or until all processes have to start again."""

    def __init__(self, crew: Crew, server: ServerClient, driver: Driver, outcome: Outcome) -> None:
        self._crew, self._server, self._driver, self._outcome = crew, server, driver, outcome
        self._cluster = driver.cluster
        self._job = crew.job
        self._workers = dict.fromkeys(crew.job.workers, WorkerStatus())
        self._losses = LossCounter()
        self._calls: dict[Ref[Any], str] = {}
        """Call without an answer yet -> its worker."""
        self.records = 0
        """Number of step records that the driver was told."""

    def run(self) -> Outcome:
        """Run all phases of all workers.

        Raises:
            RestartAllError: a process is lost, and cannot be replaced while the others go on.
        """
        job, crew = self._job, self._crew
        nodes = await_start(self._cluster, job, {name: crew.call(name, "node") for name in job.workers})
        self._log_nodes(nodes)
        self._server.begin()
        with decoders(self._cluster, job, nodes) as decoder_of:
            self.run_phase("prepare", {name: (decoder_of.get(name),) for name in job.workers})
            self.run_phase("train")
        while True:  # until neither the server nor a worker was lost on the way to the end
            steps = self.run_phase("confirm_finished")
            self._outcome.paused = is_paused(steps.values(), job.steps)
            if self._outcome.paused:
                self._server.call("snapshot_for_checkpoint")
            self.run_phase("answer_last_requests")
            if self.poll() and self._server.call("has_ended"):
                return self._outcome

    def run_phase(self, phase: str, arguments: Mapping[str, tuple[Any, ...]] | None = None) -> dict[str, Any]:
        """Run a phase of every worker to its end; where a process is lost meanwhile, another one takes its place.

        Args:
            arguments: worker -> arguments of the phase.
        Returns:
            Worker -> result of the phase.
        """
        for name in self._job.workers:
            self._call(name, phase, *(arguments or {}).get(name, ()))
        results: dict[str, Any] = {}
        while self._calls:
            moved = self._take_answers(phase, results)
            moved += self._place_guests(phase)
            self._run_again(moved, PHASES[: PHASES.index(phase) + 1])
            self.poll()
            self._confirm_again()
            if phase == "train":
                self._request_answers()
        return results

    def poll(self) -> bool:
        """Look after all processes, and tell the driver what happened.

        Returns:
            False if values of a snapshot were lost with the server before the driver could fetch them.
        """
        if self._server.watch():
            self._update(self._job.workers, confirm_again=True)
        news = records, completed, progress = self._server.drain()
        all_told = take(self._job, self._driver, self._outcome, news, self._server.snapshot)
        for version in completed:
            self._server.call("drop_snapshot", version)
        self._note(records, progress)
        if self._driver.wants_pause() and not self._server.pausing:
            self._server.pause()
        self._end_hanging_workers()
        self._check_places()
        return all_told

    def replace(self, name: str, reason: str) -> list[str]:
        """Let another process take the place of the process of a worker.

        Returns:
            The workers that go on in another process now.
        Raises:
            RestartAllError: under `sync`.
            TrainingError: a worker was lost too often.
        """
        self._server.note_loss(name, f"{self._title(name)} was lost: {reason}")
        for other in self._crew.sharing_process(name):
            loss = self._losses.add(other, self._workers[other].step)
            if loss.too_often:
                raise TrainingError(
                    f"{self._title(other)} was lost {loss.count} times without a step made after step "
                    f"{loss.steps_before}: {reason}",
                    self._about(other),
                )
        message = "%s was lost; another process goes on from its last checkpoint."
        log.warning(message, self._title(name), extra=self._about(name))
        moved = self._crew.replace(name)
        for other in moved:
            self._outcome.note_loss(other)
            self._update([other], lost_pid=self._workers[other].pid, trained=False)
        return moved

    # Steps of `run_phase`.

    def _take_answers(self, phase: str, results: dict[str, Any]) -> list[str]:
        """Wait a little for calls, and take the results of those that are done.

        Returns:
            The workers that go on in another process, because theirs was lost.
        """
        done, _ = self._cluster.wait(list(self._calls), count=len(self._calls), timeout_s=POLL_S)
        moved: list[str] = []
        for call in done:
            name = self._calls.pop(call)
            if name in moved:  # it shared the process of another worker, which is replaced already
                continue
            try:
                results[name] = self._cluster.get(call)
            except RestartAllError as error:
                self._server.note_loss(name, f"{self._title(name)} is lost: {getattr(error, 'cause', error)}")
            except RayTaskError as error:
                self.poll()  # tell the driver of the last steps, and save a checkpoint that is complete
                why = f"{error.cause}\n{error}"
                raise failure(name, self._job.workers[name], self._workers[name].step, why) from None
            except ENDED as error:
                moved += self.replace(name, str(error))
            else:
                if phase != "prepare":
                    self._update([name], trained=True)
                self._outcome.note_recovery(name)
        return moved

    def _place_guests(self, phase: str) -> list[str]:
        """Return the guests that go on in a process of their own now."""
        busy = set(self._calls.values()) if phase == "train" else set()
        training = {name for name in busy if not self._workers[name].trained}
        any_lost = bool(self._outcome.lost_at)
        nodes = self._crew.grow(guests_to_place(training, any_lost=any_lost, pausing=self._server.pausing))
        self._log_nodes(nodes)
        return list(nodes)

    def _run_again(self, moved: Collection[str], phases: Sequence[str]) -> None:
        """Let workers that moved to another process run there the phases that they had already run, and the present
        one."""
        self._calls = {call: name for call, name in self._calls.items() if name not in moved}
        for name in moved:
            self._call(name, "run_phases", phases)

    def _confirm_again(self) -> None:
        names = workers_to_confirm(self._workers)
        self._update(names, confirm_again=False)
        for name in names:
            self._call(name, "confirm_finished")

    def _request_answers(self) -> None:
        """Let workers that have made their last step answer snapshot requests while others train."""
        if any(worker.trained for worker in self._workers.values()):
            names = self._server.call("workers_with_requests")
            for name in idle_workers(names, self._workers, set(self._calls.values())):
                self._call(name, "answer_requests")

    def _call(self, name: str, method: str, *arguments: Any) -> None:
        self._calls[self._crew.call(name, method, *arguments)] = name

    # Steps of `poll`.

    def _note(self, records: Sequence[StepRecord], progress: Progress) -> None:
        """Note where the workers stand, and who is back after a loss."""
        for name in self._workers:
            self._update([name], step=progress.workers[name].step)
        self.records += len(records)
        for record in records:
            self._outcome.note_recovery(WHOLE_RUN)
            self._update([record.worker], pid=record.pid)
            if is_back(self._workers[record.worker], record.pid):
                self._outcome.note_recovery(record.worker)

    def _end_hanging_workers(self) -> None:
        limit_s = silence_limit_s(map(self._crew.process, self._job.workers), self._job.spec.resources.step_timeout_s)
        silent = self._server.call("silent_workers", limit_s, set(self._calls.values()))
        for name in hanging_workers(silent, self._outcome.lost_at):
            message = "%s made no step for %g s; its process is ended."
            log.warning(message, self._title(name), limit_s, extra=self._about(name))
            self._crew.kill_process(name)

    def _check_places(self) -> None:
        timeout_s = self._job.spec.resources.start_timeout_s
        now = self._cluster.clock.monotonic()
        overdue = overdue_workers(self._job.workers, self._outcome.lost_at, now, timeout_s)
        if overdue:
            raise start_timeout(self._cluster, self._job, overdue)

    # What is known of workers.

    def _update(self, names: Iterable[str], **changes: Any) -> None:
        for name in names:
            self._workers[name] = replace(self._workers[name], **changes)

    def _log_nodes(self, nodes: Mapping[str, str]) -> None:
        for name, node in nodes.items():
            log.info("Started on node %s.", node, extra=self._about(name))

    def _title(self, worker: str) -> str:
        return f"Worker '{worker}' of task '{self._job.workers[worker]}'"

    def _about(self, worker: str) -> dict[str, object]:
        return {"task": self._job.workers[worker], "worker": worker, "step": self._workers[worker].step}


def await_start(cluster: Cluster, job: Job, starts: Mapping[str, Ref[str]]) -> dict[str, str]:
    """Wait until all workers have started.

    Args:
        starts: worker -> call that returns the cluster's name of its node.
    Returns:
        Worker -> the cluster's name of its node.
    Raises:
        TrainingError: workers did not start in time; the message names them.
        RestartAllError: a worker was lost while it started.
    """
    timeout_s = job.spec.resources.start_timeout_s
    _, missing = cluster.wait(list(starts.values()), count=len(starts), timeout_s=timeout_s)
    if missing:
        raise start_timeout(cluster, job, [name for name, start in starts.items() if start in missing])
    try:
        return {name: cluster.get(start) for name, start in starts.items()}
    except ENDED as error:  # a node may be lost with the processes that start there
        raise RestartAllError(f"A worker was lost while it started: {error}".splitlines()[0]) from None
