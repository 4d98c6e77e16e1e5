"""The training loop of one worker."""

from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from multitask.server.messages import Push
from multitask.worker.server import Server
from multitask.worker.task_worker import TaskWorker


def train_steps(worker: TaskWorker, server: Server, steps: int, in_flight: int) -> Iterator[None]:
    """Train one worker; yield after each push, so that engine `local` can run several workers in turn.

    Args:
        steps: the step at which this worker has finished.
        in_flight: pushes that may be unanswered while the next gradients are computed; 0 waits for every answer.
    """
    unanswered: deque[tuple[Any, Push, dict[str, Tensor]]] = deque()

    def absorb_oldest() -> bool:
        handle, push, private_pushes = unanswered.popleft()
        reply, values = server.wait(handle)
        for part in worker.absorb(push, private_pushes, reply, values):
            worker.report(server, part)
        return reply.pause

    first, values = server.pull(worker.name)
    worker.receive(first, values)
    pause = first.pause
    while worker.step < steps and not pause:
        push, gradients, private_pushes = worker.compute()
        unanswered.append((server.push(push, gradients), push, private_pushes))
        yield
        if len(unanswered) > in_flight:
            pause = absorb_oldest()
    while unanswered:
        pause = absorb_oldest()
    worker.keep_features()
    if worker.step == steps:
        server.finish(worker.name, worker.step)
