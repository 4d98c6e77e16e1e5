"""What the parameter server is told about a run: its tasks, and the rules by which it applies pushes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServedTask:
    """What the server knows about one task."""

    shared: tuple[str, ...]
    """Groups of tensors that are not private to the task, even if no other task uses them in this job."""
    private: tuple[str, ...] = ()
    """The task's private groups that lie on the server, because the task has several workers."""
    weight: float = 1.0
    """Weight of the gradients of this task's workers in a mean over workers."""

    @property
    def groups(self) -> tuple[str, ...]:
        """All groups on the server that the task uses."""
        return self.shared + self.private


@dataclass(frozen=True)
class Rules:
    """When the server applies pushes, and when it takes snapshots."""

    evaluate_every_rounds: int
    save_every_rounds: int | None = None
    save_every_s: float | None = None
    together: bool = False
    """True: the pushes of a round are applied as one weighted mean (`sync`). False: each push is applied at once
    (`async`, `bounded`)."""
    bound: int | None = None
    """Number of steps that a worker may be ahead of the slowest worker; None for no bound."""
    in_flight: int = 0
    """Number of unanswered pushes that a worker may have while it computes its next step."""
    divide_rate_by_staleness: bool = False
