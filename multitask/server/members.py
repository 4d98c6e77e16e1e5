"""What the server knows about each worker: its newest process, its steps and the answers to its latest pushes."""

from collections import deque
from dataclasses import dataclass

from multitask.server.messages import Push
from multitask.server.progress import WorkerProgress


@dataclass(frozen=True)
class Answer:
    """What became of a worker's push."""

    step: int | None
    """Step of the push; None before the first push of a process."""
    rate: float
    """Rate of the task's private tensors when the push was applied."""
    rejected: str | None = None
    """Why the push was not applied; None if it was."""
    redone: bool = False
    """True for a step that was made again after its worker was lost."""


class Member:
    """One worker as the server knows it."""

    def __init__(self, task: str, progress: WorkerProgress, in_flight: int, answer: Answer) -> None:
        """Args:
        progress: the server's own counters of this worker, not a copy.
        in_flight: number of unanswered pushes that the worker may have while it computes its next step.
        answer: the answer before the first push.
        """
        self.task = task
        self.progress = progress
        self.incarnation = 0
        """Number of the worker's newest process."""
        self.queue = 0
        """How many workers were waiting for others when this worker's latest push arrived."""
        self._in_flight = in_flight
        self._redo_until = 0
        """The first step that the worker's newest process does not make again."""
        self._answers = deque([answer], maxlen=in_flight + 1)
        """Oldest first. The worker may send its next push before it has the answer to the one before."""

    @property
    def latest(self) -> Answer:
        """The answer to the worker's latest push."""
        return self._answers[-1]

    def join(self, incarnation: int, step: int | None, position: int) -> int:
        """Note the worker's newest process; see `ParameterServer.join`.

        Returns:
            Number of steps that are lost: the worker made them, and the server went back to a version before them.
        """
        self.incarnation = incarnation
        lost = 0 if step is None else max(0, step - self.progress.step)
        if step is not None and lost:
            self.progress.lost += lost
            self.progress.step, self.progress.position = step, position
        self._redo_until = 0 if step is None else self.progress.step
        return lost

    def forget_answers(self, answer: Answer) -> None:
        """Forget the answers to an earlier process, and keep `answer` as the one before the new process's first
        push."""
        self._answers.clear()
        self.answer(answer)

    def answer(self, answer: Answer) -> None:
        """Keep the answer to the worker's latest push."""
        self._answers.append(answer)

    def answer_to(self, step: int | None) -> Answer:
        """Return the answer to the push of a step, or the latest answer where that one is not kept."""
        return next((answer for answer in self._answers if answer.step == step), self.latest)

    def is_early(self, push: Push) -> bool:
        """Return whether a push has overtaken an earlier push of the same process."""
        return push.incarnation == self.incarnation and 0 < push.step - self.progress.step <= self._in_flight

    def is_redone(self, push: Push) -> bool:
        """Return whether a push is of a step that the worker's newest process makes again."""
        return push.step < self._redo_until
