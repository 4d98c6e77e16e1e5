"""What a job's spec means for the parameter server: when pushes are applied, and at which rate."""

from collections.abc import Sequence
from dataclasses import asdict

from multitask.server.parameter_server import Rules
from multitask.server.schedules import SCHEDULES, Schedule
from multitask.spec.schema import AllreduceSpec, BoundedSpec, EngineSpec, JobSpec, LocalSpec, SyncSpec


def applies_together(engine: EngineSpec) -> bool:
    """All workers' pushes of a round make one update, as under `sync` and `allreduce`."""
    by_rounds = isinstance(engine, LocalSpec) and engine.schedule == "rounds"
    without_bound = isinstance(engine, BoundedSpec) and engine.staleness == 0
    return isinstance(engine, AllreduceSpec | SyncSpec) or by_rounds or without_bound


def make_rules(spec: JobSpec) -> Rules:
    """When the server of this job applies pushes and puts versions aside."""
    engine = spec.engine
    bound = getattr(engine, "staleness", None)
    minutes = spec.checkpoints.every_minutes
    return Rules(
        evaluate_every_rounds=spec.evaluate_every,
        save_every_rounds=spec.checkpoints.every_rounds,
        save_every_s=None if minutes is None else 60 * minutes,
        together=applies_together(engine),
        bound=bound or None,
        in_flight=getattr(engine, "in_flight", 0),
        divide_rate_by_staleness=getattr(engine, "divide_rate_by_staleness", False),
    )


def make_schedule(spec: JobSpec) -> Schedule:
    options = {key: value for key, value in asdict(spec.schedule).items() if key != "name"}
    if spec.schedule.name == "cosine":
        options["rounds"] = spec.steps
    return SCHEDULES[spec.schedule.name](spec.optimizer.rate, **options)


def images_factor(spec: JobSpec, tasks: Sequence[str]) -> float:
    """What the rate rule makes of the rate of a group: 1, or images of one of its updates / 256.

    An update is one push (one worker's batch * accumulate), or, where pushes are applied together, the mean over those
    of all workers that use the group: a private group's update has fewer images than a shared one's.

    Args:
        tasks: those that use the group.
    Source: Goyal et al., "Accurate, Large Minibatch SGD", 2017, arXiv:1706.02677; "Parasite Networks" and "Visual
        Prompt Tuning" state their rates for 256 images.
    """
    if spec.rate_rule == "fixed":
        return 1.0
    users = [task for task in spec.tasks if task.name in tasks]
    pushes = sum(task.workers for task in users) if applies_together(spec.engine) else 1
    return users[0].batch_size * users[0].accumulate * pushes / 256
