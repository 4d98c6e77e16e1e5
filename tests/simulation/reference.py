"""Undisturbed runs, with which disturbed ones are compared bit for bit."""

from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor

from tests.simulation.run import Story, simulate
from tests.simulation.schedule import Schedule, undisturbed
from tests.simulation.views import view_of_evaluation

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """All versions of an undisturbed run of engine `local` by rounds."""

    values: dict[int, Tensors]
    """Version -> its tensors."""
    saved: dict[int, Tensors]
    """Version -> the tensors of its checkpoint, with the slots of the optimiser."""


def reference_of(schedule: Schedule) -> Reference | None:
    """Return the undisturbed run of a schedule's job; None where the schedule has none."""
    return None if schedule.reference is None else _reference(*schedule.reference)


@cache
def _reference(engine: str, number: int) -> Reference:
    schedule = undisturbed(engine, number)
    job = replace(schedule.job, evaluate_every=1, checkpoints={"every_rounds": 1, "keep": 1})
    story: Story = simulate(replace(schedule, job=job))
    assert story.lives == ["finished"], story
    values = {
        evaluation.version: dict(view_of_evaluation(news.job, evaluation).tensors)
        for news in story.news
        for evaluation in news.evaluations
    }
    return Reference(values, {checkpoint.progress.version: checkpoint.tensors for _, _, checkpoint in story.saved})
