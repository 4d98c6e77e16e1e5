"""Training ends when a version holds numbers that are not finite: nothing can be learned from them any more."""

import math

from multitask.errors import TrainingError
from multitask.job import Job
from multitask.server.messages import Evaluation, as_tensor, is_finite
from patches.structure import not_finite


def check_finite(job: Job, version: Evaluation) -> None:
    """Check the values of a version that was evaluated, and its metrics.

    A push that is not finite changes no value, but an update with finite gradients can still overflow. The last one
    would otherwise be found by no loss.

    Args:
        job: the job that the version belongs to.
    Raises:
        TrainingError: a value or a metric is NaN or infinite. The message names a tensor, or the metrics.
    """
    if not all(is_finite(as_tensor(group.values)) for group in version.groups.values()):
        backbone, private = job.state(version.groups)
        owners = {"the backbone": backbone, **{f"task '{task}'": tensors for task, tensors in private.items()}}
        found = next(f"tensor '{name}' of {owner}" for owner in owners if (name := not_finite(owners[owner])))
    else:
        bad = [task for task, metrics in version.metrics.items() if not all(map(math.isfinite, metrics.values()))]
        if not bad:
            return
        found = f"the validation metrics of task '{bad[0]}'"
    raise TrainingError(
        f"Version {version.version} (round {version.round}) is of no use: NaN or infinity in {found}. Lower "
        "optimizer.rate, or look at the task's images and labels."
    )
