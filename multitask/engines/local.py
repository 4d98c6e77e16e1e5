"""Engine `local`: all workers in one process, one update each in turn."""

import os
from functools import partial
from typing import Any

from multitask.engines.interface import Outcome, Watch
from multitask.evaluation import torch_threads
from multitask.job import Job
from multitask.server.messages import Push, Reply
from multitask.server.parameter_server import ParameterServer
from multitask.spec import LocalSpec
from multitask.worker import train_steps


class _Direct:
    """A server in the same process: answers at once."""

    def __init__(self, server: ParameterServer) -> None:
        self._server = server

    def push(self, push: Push) -> Reply:
        return self._server.push(push)

    def wait(self, handle: Reply) -> Reply:
        return handle

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._server, method)(*arguments)


def run(job: Job, watch: Watch) -> Outcome:
    """Train with every worker in this process: the numerical reference of the other engines."""
    assert isinstance(job.spec.engine, LocalSpec)
    delay = job.spec.engine.delay
    with torch_threads(job.spec.resources.threads_per_worker):
        server = job.make_server()
        direct = _Direct(server)
        batches = {}
        for names in job.sharing(job.workers):
            stream = job.make_stream(names)
            for name in names:
                batches[name] = job.view(name).batches(partial(stream.next, name))
        workers = [job.make_worker(name, batches[name]) for name in job.workers]
        loops = [train_steps(worker, direct, job.spec.steps, delay) for worker in workers]
        # One step of each worker in turn, until the loops end (all in the same turn).
        while loops:
            loops = [loop for loop in loops if next(loop, "ended") != "ended"]
            watch(*server.drain())
        for worker in workers:
            worker.complete(direct)
        watch(*server.drain())
    return Outcome(server.result(), dict.fromkeys(job.workers, os.getpid()))
