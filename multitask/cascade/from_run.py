"""Fitting a cascade over the tasks of a finished run."""

import os
from typing import Any

from multitask.cascade.artifact import save_package
from multitask.cascade.cascade import Cascade
from multitask.cascade.costs import count_macs
from multitask.cascade.errors import CascadeError
from multitask.cascade.fitting import fit
from multitask.cascade.predictions import Predictions, read_predictions
from multitask.run.directory import Run, evaluate_models
from patches.bundle import inspect_bundle
from patches.images.preprocessing import Preprocessing

SEED = 0
"""Seed of the random half of the validation images."""


def cascade_from_run(run: Run, to: str | os.PathLike[str], **options: Any) -> tuple[Cascade, Predictions]:
    """Fit a cascade over tasks that have the same images and classes, such as the resolutions of one data set.

    The best version of the run is exported, and its predictions on the validation and test images are written to
    `predictions/` in the run directory. The cascade is fitted on a random half of the validation images, as in
    `multitask cascade fit`. The fit does not use the test images.

    Args:
        run: the finished run.
        to: the package to write.
        options: options of `multitask.cascade.fit`.
    Returns:
        The cascade, and the predictions on the test images, for a check of the cascade.
    Raises:
        CascadeError: the tasks read several data sets, or their numbers of classes differ.
    """
    data = sorted({task.data for task in run.spec.tasks})
    if len(data) > 1:
        raise CascadeError(
            f"The tasks of '{run.directory}' read {len(data)} data sets ({', '.join(data)}), but the models of a "
            "cascade answer the same images. Choose a run whose tasks read one data set."
        )
    export = run.export()
    _, models = run.models("best")
    pools = {}
    for split in ("validation", "test"):
        folder = run.directory / "predictions" / split
        evaluate_models(models, run.spec, split, folder)
        pools[split] = read_predictions(folder, list(models))
    views = {
        name: Preprocessing.from_json(inspect_bundle(bundle).preprocessing) for name, bundle in export.bundles.items()
    }
    fitting, _ = pools["validation"].halves(SEED)
    cascade = fit(fitting, count_macs(models, views), **options)
    save_package(cascade, to, export.backbone.parent)
    return cascade, pools["test"]
