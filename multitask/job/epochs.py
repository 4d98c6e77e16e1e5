"""The length of a job whose spec says it in epochs."""

from collections.abc import Mapping
from fractions import Fraction
from math import ceil

from multitask.spec.reading import load_spec
from multitask.spec.schema import JobSpec


def with_steps(spec: JobSpec, rows: Mapping[str, int]) -> JobSpec:
    """Return a spec with `steps` and `evaluate_every` in place of `epochs`; a spec with `steps` stays as it is.

    All workers make the same number of steps, and their tasks have data sets of different sizes. The worker with the
    longest epoch sets the number: it goes through its rows `epochs` times, and every other worker more often.

    Args:
        spec: each task has its number of workers.
        rows: task -> number of rows of its training table.
    Raises:
        SpecError: the steps do not fit the other keys, for example a warm-up that is longer.
    """
    if spec.epochs is None:
        return spec
    epoch = max(Fraction(ceil(rows[t.name] / t.workers), t.batch_size * t.accumulate) for t in spec.tasks)
    # `str` makes 0.1 a tenth. The float's own value is a little more, which could add a step.
    steps = ceil(Fraction(str(spec.epochs)) * epoch)
    every = spec.evaluate_every or max(1, round(epoch))
    return load_spec(spec, {"steps": steps, "epochs": None, "evaluate_every": every})
