"""The decisions of a run's driver about losses, hanging workers, guests, pauses and the end of the run.

Each decision is a plain function from what the driver knows to what it does. Nothing here calls Ray, reads a clock or
waits; `multitask.engines.served` and `multitask.engines.allreduce` act on what these functions return.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from multitask.job.assignment import rank_of

RESTARTS_WITHOUT_A_STEP = 3
"""Number of times that a worker, or all workers together, may be lost without a step made in between."""


# Losses.


class Recovery(Enum):
    """How a run goes on after a process was lost."""

    REPLACE = auto()
    """The lost process alone is started again, while the others go on."""
    RESTART_ALL = auto()
    """All processes are started again, from the latest checkpoint."""


def recovery(averages_rounds: bool) -> Recovery:
    """Return how an engine with a parameter server recovers.

    Args:
        averages_rounds: the pushes of a round are applied as one mean (`sync`), so no worker can go on without the
            others.
    """
    return Recovery.RESTART_ALL if averages_rounds else Recovery.REPLACE


@dataclass(frozen=True)
class Loss:
    """How often in a row something was lost without a step made in between."""

    count: int
    """Number of these losses, the present one included."""
    steps_before: int
    """Steps that were made up to the previous loss; -1 for the first loss."""

    @property
    def too_often(self) -> bool:
        """Whether the run has to end, because another restart is not likely to help."""
        return self.count > RESTARTS_WITHOUT_A_STEP


class LossCounter:
    """Counts, for each name, the losses without a step made in between."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, int]] = {}
        """Name -> losses without a step in between, and steps that were made up to the last loss."""

    def add(self, name: str, steps: int) -> Loss:
        """Count a loss.

        Args:
            name: a worker, or `WHOLE_RUN` where all workers are lost together.
            steps: steps that were made under this name up to now. If it is not larger than at the previous loss, no
                step was made since. It can even be smaller, after the server went back to a checkpoint.
        """
        count, steps_before = self._last.get(name, (0, -1))
        count = count + 1 if steps <= steps_before else 1
        self._last[name] = count, steps
        return Loss(count, steps_before)


class ServerChange(Enum):
    """What happened to the processes of the parameter server since the driver last looked."""

    NONE = auto()
    RESTARTED = auto()
    """The server was started again, and went back to a checkpoint."""
    SHARD_RESTARTED = auto()
    """A shard was started again without the others, so its values are older than theirs: the server has to go back to
    a checkpoint with all its shards."""


def server_change(known: Sequence[int], server: Sequence[int], shards: Sequence[int]) -> ServerChange:
    """Compare the incarnations of the server's processes.

    Args:
        known: what the server answered when it last began: its own incarnation, then those of the other shards.
        server: what the server answers now.
        shards: what each of the other shards answers now.
    """
    if list(server[1:]) != list(shards):
        return ServerChange.SHARD_RESTARTED
    return ServerChange.NONE if list(server) == list(known) else ServerChange.RESTARTED


# Workers.


@dataclass(frozen=True)
class WorkerStatus:
    """What the driver knows of a worker under `async`, `bounded` and `sync`."""

    step: int = 0
    """Steps that the server has counted."""
    pid: int = 0
    """Process id of the latest step that the driver has heard of; 0 before the first one."""
    lost_pid: int = 0
    """Value of `pid` when the worker was last lost. The driver may hear of more steps of this process later."""
    trained: bool = False
    """The worker's present process has made the last step, or has stopped for a pause."""
    confirm_again: bool = False
    """The server was restored, so it may not know that this worker has made its last step."""


def is_back(worker: WorkerStatus, pid: int) -> bool:
    """Return whether a step made by the process `pid` shows that a lost worker is at work again."""
    return pid != worker.lost_pid


def workers_to_confirm(workers: Mapping[str, WorkerStatus]) -> list[str]:
    """Return the workers that must tell the restored server that they have made their last step.

    Otherwise the other workers could wait for them, under `bounded` for ever.
    """
    return [name for name, worker in workers.items() if worker.trained and worker.confirm_again]


def idle_workers(names: Iterable[str], workers: Mapping[str, WorkerStatus], busy: Collection[str]) -> list[str]:
    """Return those of `names` that have made their last step and have no call to work on."""
    return [name for name in names if workers[name].trained and name not in busy]


def silence_limit_s(processes: Iterable[object], step_timeout_s: float) -> float:
    """Return the time without a step after which a worker hangs.

    Workers that share a process take turns, so each of them may have to wait until all the others have made a step.

    Args:
        processes: the process of each worker; workers that share a process have equal entries.
    """
    return max(Counter(processes).values()) * step_timeout_s


def hanging_workers(silent: Iterable[str], lost: Collection[str]) -> list[str]:
    """Return the silent workers whose process has to be ended; a lost worker has no process that could hang."""
    return [name for name in silent if name not in lost]


def overdue_workers(names: Iterable[str], lost_at: Mapping[str, float], now: float, timeout_s: float) -> list[str]:
    """Return the workers whose new process has made no step in time, because the cluster has become too small.

    Args:
        lost_at: lost worker -> when it was lost, in seconds on the clock of `now`.
    """
    return [name for name in names if now - lost_at.get(name, now) > timeout_s]


# Guests.


def assign_hosts(workers: Mapping[str, str], needed: Mapping[str, int]) -> dict[str, str]:
    """Return, for each worker that starts as a guest, the worker of its task that hosts it.

    Args:
        workers: worker -> its task.
        needed: task -> number of its workers that need a process of their own from the start.
    """
    return {
        name: f"{task}/{rank_of(name) % needed[task]}"
        for name, task in workers.items()
        if rank_of(name) >= needed[task]
    }


def guests_to_place(training: Collection[str], *, any_lost: bool, pausing: bool) -> Collection[str]:
    """Return the workers that get a process of their own as soon as there is room, if they are guests.

    Only guests that train get one. None does while the run pauses, or while it waits for a lost worker, which needs the
    same room.
    """
    return () if any_lost or pausing else training


def worker_to_make_room(
    lost: Collection[str], grown: Mapping[str, str], nodes: Collection[str], workers: Mapping[str, str]
) -> list[str]:
    """Return the worker that goes back to its host, so that a needed process finds room; an empty list if none can.

    If a node is gone, there may not be room for both the successor of the lost process and the process of a former
    guest. A former guest of the same task is preferred.

    Args:
        lost: workers of the lost process.
        grown: worker that was a guest and now has a process of its own -> the node of this process.
        nodes: nodes that are alive.
        workers: worker -> its task.
    """
    tasks = {workers[name] for name in lost}
    candidates = [name for name, node in grown.items() if node in nodes and name not in lost]
    return sorted(candidates, key=lambda name: workers[name] in tasks)[-1:]


# The end of a run.


def is_paused(made: Iterable[int], steps: int) -> bool:
    """Return whether a run whose workers have all stopped was paused, rather than finished.

    Args:
        made: steps that each worker has made.
        steps: steps that each worker has to make.
    """
    return min(made) < steps


# Engine `allreduce`.


@dataclass(frozen=True)
class MissingRanks:
    """The ranks that have not joined the present worker group."""

    names: tuple[str, ...]
    since: float | None
    """When the first rank went missing, in seconds on the monotonic clock; None while no rank is missing."""

    def updated(self, workers: Iterable[str], joined: Collection[str], now: float) -> "MissingRanks":
        """Return the state after another look at the ranks."""
        names = tuple(name for name in workers if name not in joined)
        if not names:
            return MissingRanks((), None)
        return MissingRanks(names, now if self.since is None else self.since)

    def seconds(self, now: float) -> float:
        """Return for how long ranks have been missing."""
        return 0.0 if self.since is None else now - self.since


class TrainResult(Enum):
    """How Ray Train's work on a worker group came to its end."""

    RETURNED = auto()
    NOT_STARTED = auto()
    """Train could not start a group: the ranks found no places, or were lost while they started."""
    LOST = auto()
    """Train's own process was lost, and the ranks with it."""
    RAISED = auto()


class AfterTrain(Enum):
    """What the driver does when Ray Train's work has come to its end."""

    END = auto()
    """The run has ended."""
    START_AGAIN = auto()
    """All ranks start again from the latest checkpoint."""
    NO_PLACES = auto()
    """The run fails, because ranks found no places in time."""
    FAIL = auto()
    """The run fails with Train's error."""


def after_train(result: TrainResult, *, all_reported: bool, missing_s: float, start_timeout_s: float) -> AfterTrain:
    """Decide what to do when Ray Train's work has come to its end.

    Args:
        all_reported: the ledger says that all ranks have done their work. False after a normal end means that the
            ledger was lost after the ranks had ended.
        missing_s: for how long ranks have been missing.
    """
    if result is TrainResult.RETURNED:
        return AfterTrain.END if all_reported else AfterTrain.START_AGAIN
    if result is TrainResult.RAISED:
        return AfterTrain.FAIL
    if result is TrainResult.NOT_STARTED and missing_s > start_timeout_s:
        return AfterTrain.NO_PLACES
    return AfterTrain.START_AGAIN
