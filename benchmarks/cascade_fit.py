"""How long does it take to fit a cascade to the predictions of many models, and how does that grow with the images?

The predictions are drawn at random: the models have rising costs and see the same images through noise, most of which
is common to all models. `rules` is the part of the time that temperatures, scores and predictors take; the rest is the
greedy construction and the memory of the fitted images. `saving` and `gain` (points of accuracy) compare the cascade
with its reference on as many new images.
"""

import time
from typing import Any

import numpy as np

from benchmarks._common import at_most, environment, finish, make_parser
from multitask.cascade import Costs, Predictions, check, fit
from multitask.cascade.fitting import candidates
from multitask.cascade.rules import SCORES

PROMISED_IMAGES = 50_000
SLACK = 0.0025


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100], help="of the runs with 50,000 images")
    parser.add_argument("--growth", type=int, nargs="+", default=[200_000, 1_000_000], help="images, with 10 classes")
    arguments = parser.parse_args()
    around = environment()
    fit(draw(2000, 10, 3, seed=9), costs(3))  # imports scikit-learn, which is no part of the question
    sizes = [(PROMISED_IMAGES, classes) for classes in arguments.classes] + [
        (images, 10) for images in arguments.growth
    ]
    rows = [measure(images, classes, arguments.models) for images, classes in sizes]
    goals = [
        at_most(f"seconds for {row['images']:,} images of {row['classes']} classes", row["fit s"], 10.0)
        for row in rows
        if row["images"] == PROMISED_IMAGES
    ]
    settings = {key: value for key, value in vars(arguments).items() if key != "out"} | {"rules": len(SCORES)}
    title = f"{arguments.models} models, {len(SCORES)} rules"
    finish(arguments.out, tables={title: rows}, environment=around, goals=goals, settings=settings)


def costs(models: int) -> Costs:
    return Costs("MACs", {f"model{number:02}": 10.0 * 1.15**number for number in range(models)})


def draw(images: int, classes: int, models: int, seed: int) -> Predictions:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, images)
    ease = 0.2 + 1.6 * random.exponential(1.0, images).astype(np.float32)
    noise = random.standard_normal((images, classes), dtype=np.float32)
    logits = {}
    for number, model in enumerate(costs(models).alone):
        found = noise + 0.7 * random.standard_normal((images, classes), dtype=np.float32)
        found[np.arange(images), labels] += (2.5 + number / models) * ease
        logits[model] = found
    return Predictions(np.arange(images), labels, logits)


def measure(images: int, classes: int, models: int) -> dict[str, Any]:
    fitting = draw(images, classes, models, seed=0)
    start = time.perf_counter()
    candidates(fitting, SCORES)
    rules = time.perf_counter() - start
    start = time.perf_counter()
    cascade = fit(fitting, costs(models), slack=SLACK)
    seconds = time.perf_counter() - start
    del fitting
    checked = check(cascade, draw(images, classes, models, seed=1))
    return {
        "images": images,
        "classes": classes,
        "fit s": seconds,
        "rules s": rules,
        "microseconds an image": 1e6 * seconds / images,
        "reference %": 100 * checked.reference.accuracy,
        "stages": len(cascade.point().stages),
        "saving %": 100 * checked.saving.mean,
        "gain": 100 * checked.accuracy_gain.mean,
    }


if __name__ == "__main__":
    main()
