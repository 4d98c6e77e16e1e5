"""A task that joins a job half-way learns as well as one that was there from the start."""

from dataclasses import replace
from pathlib import Path

import pytest

from multitask.job.job import Job
from multitask.spec.reading import load_spec
from multitask.spec.schema import JobSpec
from tests.conftest import run_engine, store_of

DEMO = Path(__file__).parents[2] / "jobs" / "specs" / "demo.yaml"
STEPS = 160


def spec_of(tasks: list[str], directory: Path) -> JobSpec:
    demo = load_spec(DEMO)
    chosen = [replace(task, batch_size=128) for task in demo.tasks if task.name in tasks]
    changes = {
        "engine": {"name": "local"},
        "steps": STEPS,
        "evaluate_every": STEPS,
        # The paper's kind: a cosine would leave the shared tensors at rate 0 for the late task's second half.
        "schedule": {"name": "exponential", "factor": 0.98, "every_rounds": 4},
        "directory": str(directory),
    }
    return load_spec(replace(demo, tasks=tuple(chosen)), changes)


@pytest.mark.slow
def test_a_task_attached_half_way_ends_within_a_point_of_one_trained_from_the_start(tmp_path: Path) -> None:
    """Digits makes the same number of steps of its own in both jobs; the shared rate has fallen when it joins late.

    With seeds 0 to 3 it ends 0.2 to 1.6 points above. With batches of 64 the seeds differ more: 1.8 points below to 2.2
    above. With the demo's cosine over 160 steps, and three tasks, it ended 2.0 points below (94.8 against 96.8 %): see
    the schedule above.
    """
    together = run_engine(Job(spec_of(["fashion", "digits"], tmp_path / "together")))

    first = Job(spec_of(["fashion"], tmp_path / "late"))
    polls = iter(range(10_000))
    paused = run_engine(first, wants_pause=lambda: next(polls) >= STEPS // 2)
    assert paused.outcome.paused
    assert STEPS // 2 <= paused.progress.workers["fashion/0"].step < STEPS // 2 + 5
    late = run_engine(Job(spec_of(["fashion", "digits"], tmp_path / "late"), store_of(first).latest()))

    assert sum(record.task == "digits" for record in late.records) == STEPS
    from_start = together.outcome.versions["last"].metrics
    joined = late.outcome.versions["last"].metrics
    print({task: (from_start[task]["top1"], joined[task]["top1"]) for task in from_start})
    assert joined["digits"]["top1"] >= from_start["digits"]["top1"] - 1.0
