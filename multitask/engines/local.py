"""Engine `local`: all workers in one process. Pushes are applied one by one, or together at the end of a round."""

from collections.abc import Iterator
from functools import partial

from multitask.engines.decisions import is_paused
from multitask.engines.interface import Driver, Outcome, take
from multitask.errors import failure
from multitask.evaluation import torch_threads
from multitask.job.job import Job
from multitask.server.messages import Gradients, GroupValues, Push, Reply, SnapshotRequest
from multitask.server.parameter_server import ParameterServer
from multitask.spec.engines import LocalSpec
from multitask.worker import TaskWorker, Values, train_steps

Answer = tuple[Reply, Values]


class DirectServer:
    """The server of a worker in the same process."""

    def __init__(self, server: ParameterServer, delay: int = 0) -> None:
        """Args:
        delay: pushes that a worker leaves unanswered. If there are any, an answer holds copies of the values, because
            the worker reads them when the server's values have changed.
        """
        self._server, self._delay = server, delay

    def pull(self, worker: str) -> Answer:
        reply = self._server.reply(worker)
        assert reply is not None, "the worker's round is not complete, so it cannot go on"
        groups = self._server.shard.groups
        return reply, {name: [groups[name].view()] for name in self._server.groups_of(worker)}

    def push(self, push: Push, gradients: Gradients) -> str | Answer:
        self._server.push(push, gradients)
        if not self._delay:
            return push.worker
        reply, values = self.pull(push.worker)
        groups = self._server.shard.groups
        return reply, {name: [groups[name].state()] for name in values}

    def wait(self, handle: str | Answer) -> Answer:
        return self.pull(handle) if isinstance(handle, str) else handle

    def snapshot(self, version: int, worker: str) -> Values | None:
        kept = self._server.shard.snapshot(version)
        return None if kept is None else {name: [kept[name]] for name in self._server.groups_of(worker)}

    def snapshot_requests(self, worker: str) -> tuple[SnapshotRequest, ...]:
        return self._server.snapshot_requests(worker)

    def report_state(
        self, request: SnapshotRequest, worker: str, step: int, position: int, private: dict[str, GroupValues]
    ) -> None:
        self._server.report_state(request, worker, step, position, private)

    def report_evaluation(
        self, request: SnapshotRequest, task: str, metrics: dict[str, float], private: dict[str, GroupValues]
    ) -> None:
        self._server.report_evaluation(request, task, metrics, private)

    def report_alive(self, worker: str) -> None:
        self._server.report_alive(worker)

    def finish(self, worker: str, step: int) -> None:
        self._server.finish(worker, step)


def run(job: Job, driver: Driver) -> Outcome:
    """Train with every worker in this process: the numerical reference of the other engines."""
    assert isinstance(job.spec.engine, LocalSpec)
    delay = job.spec.engine.delay
    clock = driver.cluster.clock
    outcome = Outcome(clock)
    with torch_threads(job.spec.resources.threads_per_worker):
        server = job.make_server(clock=clock)
        direct = DirectServer(server, delay)
        workers = make_workers(job)

        def kept(version: int) -> Values:
            return {name: [group] for name, group in (server.shard.snapshot(version) or {}).items()}

        def poll() -> None:
            news = server.drain()
            take(job, driver, outcome, news, kept)
            for version in news[1]:
                server.drop_snapshot(version)

        loops = {worker: train_steps(worker, direct, job.steps, delay) for worker in workers}
        # Each worker makes one push per turn, until all loops have ended. They end in the same turn, unless a task
        # joined the run late.
        while loops:
            try:
                loops = {worker: loop for worker, loop in loops.items() if _goes_on(worker, loop)}
                for worker in workers:
                    if worker not in loops:
                        worker.answer_requests(direct)
            finally:
                poll()  # Also when a worker fails: its records are worth keeping, and a checkpoint may be complete.
            if driver.wants_pause():
                server.pause()
        outcome.paused = is_paused((worker.step for worker in workers), job.steps)
        if outcome.paused:
            server.snapshot_for_checkpoint()
        for worker in workers:
            worker.answer_last_requests(direct)
        poll()
    return outcome


def make_workers(job: Job) -> list[TaskWorker]:
    """Build all workers of a job in this process; workers that read the same rows decode each image once."""
    batches = {}
    for names in job.sharing(job.workers):
        stream = job.make_stream(names)
        for name in names:
            batches[name] = job.view(name).batches(partial(stream.next, name))
    return [job.make_worker(name, batches[name]) for name in job.workers]


def _goes_on(worker: TaskWorker, loop: Iterator[None]) -> bool:
    """Run a worker's loop up to its next push; return whether the loop has not ended."""
    try:
        return next(loop, "ended") != "ended"
    except Exception as error:
        raise failure(worker.name, worker.task, worker.step, error) from error
