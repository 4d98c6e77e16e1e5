"""Undisturbed runs, with which disturbed ones are compared bit for bit."""

from dataclasses import dataclass, replace

from torch import Tensor

from tests.simulation.run import simulate
from tests.simulation.schedule import Schedule
from tests.simulation.views import view_of_evaluation

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """All versions of an undisturbed run of engine `local` by rounds."""

    values: dict[int, Tensors]
    """Version -> its tensors."""
    saved: dict[int, Tensors]
    """Version -> the tensors of its checkpoint, with the slots of the optimiser."""


_REFERENCES: dict[str, Reference] = {}
"""Job and its steps with gradients that are not finite, in words -> its undisturbed run."""


def reference_of(schedule: Schedule) -> Reference:
    """Return the undisturbed run of a schedule's job, in which every version is evaluated and saved."""
    job = replace(
        schedule.job,
        engine={"name": "local", "schedule": "rounds"},
        evaluate_every=1,
        checkpoints={"every_rounds": 1, "keep": 1},
        resources={},
    )
    faults = {at: fault for at, fault in schedule.behaviour.faults.items() if at not in schedule.step_faults}
    key = f"{job} {faults}"
    if key not in _REFERENCES:
        behaviour = replace(schedule.behaviour, seed=0, speeds={}, faults=faults)
        _REFERENCES[key] = _run(Schedule(0, "local", job, behaviour, nodes=(8.0,)))
    return _REFERENCES[key]


def _run(schedule: Schedule) -> Reference:
    story = simulate(schedule)
    assert story.lives == ["finished"], story
    values = {
        evaluation.version: dict(view_of_evaluation(news.job, evaluation).tensors)
        for news in story.news
        for evaluation in news.evaluations
    }
    return Reference(values, {checkpoint.progress.version: checkpoint.tensors for _, _, checkpoint in story.saved})
