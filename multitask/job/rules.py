"""Rules that a job spec sets for the parameter server: when it applies pushes, and at which learning rate."""

from collections.abc import Sequence
from dataclasses import asdict

from multitask.server.parameter_server import Rules
from multitask.server.schedules import SCHEDULES, Schedule
from multitask.spec.schema import JobSpec


def make_rules(spec: JobSpec) -> Rules:
    """Return the rules by which the job's server applies pushes and takes snapshots."""
    engine = spec.engine
    minutes = spec.checkpoints.every_minutes
    assert spec.evaluate_every is not None, "a job's spec has it, also where its file gives epochs"
    return Rules(
        evaluate_every_rounds=spec.evaluate_every,
        save_every_rounds=spec.checkpoints.every_rounds,
        save_every_s=None if minutes is None else 60 * minutes,
        together=engine.together,
        bound=engine.bound,
        in_flight=engine.in_flight,
        divide_rate_by_staleness=engine.divide_rate_by_staleness,
    )


def make_schedule(spec: JobSpec) -> Schedule:
    """Return the job's schedule: the learning rate as a function of the round."""
    options = {key: value for key, value in asdict(spec.schedule).items() if key != "name"}
    if spec.schedule.name == "cosine":
        options["rounds"] = spec.steps
    return SCHEDULES[spec.schedule.name](spec.optimizer.rate, **options)


def images_factor(spec: JobSpec, tasks: Sequence[str]) -> float:
    """Return the factor that the job's rate rule puts on a group's learning rate.

    The factor is 1 with the rule `fixed`, and the number of images in one update / 256 with `per_256_images`. An update
    has the images of one push (batch_size * accumulate). Under an engine that applies pushes together it has the images
    of all workers that use the group, so a shared group's update has more images than a private group's.

    Args:
        tasks: names of the tasks that use the group.
    Source: Goyal et al., "Accurate, Large Minibatch SGD", 2017, arXiv:1706.02677; "Parasite Networks" and "Visual
        Prompt Tuning" state their rates for 256 images.
    """
    if spec.rate_rule == "fixed":
        return 1.0
    users = [task for task in spec.tasks if task.name in tasks]
    pushes = sum(task.workers for task in users) if spec.engine.together else 1
    return users[0].batch_size * users[0].accumulate * pushes / 256
