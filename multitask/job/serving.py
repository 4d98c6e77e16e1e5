"""The parameter server's parts of a job: groups with an optimizer, and the groups that each task uses."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from multitask.job.groups import Group
from multitask.job.rules import images_factor
from multitask.server.group import ParameterGroup
from multitask.server.optimizers import make_optimizer
from multitask.server.parameter_server import ServedTask
from multitask.spec.schema import JobSpec


def parameter_group(spec: JobSpec, group: Group, part: tuple[int, int] | None = None) -> ParameterGroup:
    """Return a group with the job's optimizer, and with its learning rate relative to the schedule's.

    Args:
        part: the range of the group's flat buffer that a shard holds; by default all of it.
    """
    options = {key: value for key, value in asdict(spec.optimizer).items() if key not in ("name", "rate")}
    make = partial(make_optimizer, spec.optimizer.name, **options)
    factor = spec.private_rate_factor if group.private else 1.0
    factor *= images_factor(spec, group.tasks)
    return ParameterGroup(group.layout, group.state(), make, factor, part, ema_of(spec, group))


def ema_of(spec: JobSpec, group: Group) -> float | None:
    """Return the decay of the average of a group's trained values; None for a group whose values are not averaged."""
    return next(task.ema for task in spec.tasks if task.name in group.tasks) if group.private else None


def served_tasks(spec: JobSpec, served: Sequence[Group]) -> dict[str, ServedTask]:
    """Return for each task the groups on the server that it uses, and its weight in means of gradients.

    Args:
        served: all groups that the server holds.
    """
    return {
        task.name: ServedTask(
            shared=tuple(g.name for g in served if task.name in g.tasks and not g.private),
            private=tuple(g.name for g in served if task.name in g.tasks and g.private),
            weight=task.weight,
        )
        for task in spec.tasks
    }
