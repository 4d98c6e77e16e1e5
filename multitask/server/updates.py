"""Updates: whose gradients change a group, with which weights and at which rate."""

import math
from collections.abc import Mapping, Sequence

from multitask.server.messages import Push
from multitask.server.progress import Progress
from multitask.server.rules import Rules, ServedTask
from multitask.server.schedules import Schedule
from multitask.server.shard import GroupUpdate, Update


class Updates:
    """Turns pushes into updates of groups, by the schedule and the rounds done."""

    def __init__(
        self,
        tasks: Mapping[str, ServedTask],
        workers: Mapping[str, str],
        schedule: Schedule,
        rules: Rules,
        progress: Progress,
    ) -> None:
        """Args:
        workers: worker -> its task.
        schedule: rounds done -> rate.
        progress: the server's own counters, not a copy; they are only read.
        """
        self._task_of = {worker: tasks[task] for worker, task in workers.items()}
        self._name_of = dict(workers)
        self._schedule = schedule
        self._progress = progress
        self._rules = rules

    def groups_of(self, worker: str) -> tuple[str, ...]:
        """Return the groups on the server that the worker's task uses."""
        return self._task_of[worker].groups

    def private_rate(self, worker: str) -> float:
        """Return the rate of a task's private tensors; their schedule starts when the task joins the run."""
        first = self._progress.first_round.get(self._name_of[worker], 0)
        return self._schedule(max(0, math.floor(self._progress.rounds) - first))

    def of(self, pushes: Sequence[Push]) -> Update:
        """Return one update of every group that the pushes carry, with the gradients in the order of the pushes."""
        update: Update = {}
        for name in dict.fromkeys(name for push in pushes for name in self.groups_of(push.worker)):
            users = [push for push in pushes if name in self.groups_of(push.worker)]
            tasks = [self._task_of[push.worker] for push in users]
            private = name in tasks[0].private
            rate = self.private_rate(users[0].worker) if private else self._schedule(math.floor(self._progress.rounds))
            if self._rules.divide_rate_by_staleness:
                rate /= max(1, max(push.staleness(self._progress.version) for push in users))
            keys = tuple(push.key for push in users)
            update[name] = GroupUpdate(keys, tuple(task.weight for task in tasks), rate)
        return update
