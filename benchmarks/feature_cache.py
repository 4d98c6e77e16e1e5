"""How much faster are the epochs after the first when frozen features come from a cache?

Each task trains twice on the same random images, with and without a cache, in one process and one thread. `later` is
the median time in seconds of a step after the first epoch. The losses of both runs have to be equal to the last bit.
"""

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks._common import Goal, at_least, at_most, environment, finish, make_parser
from multitask.data import write_table
from multitask.engines import ENGINES, Driver
from multitask.job.checkpoint import CheckpointStore
from multitask.job.job import Job
from multitask.server.messages import StepRecord
from multitask.spec.reading import load_spec

CLASSES = 10
GB = 1e9
# (backbone, method, options, whether the promise is about it: what DTL and the parasite compute themselves stays).
CASES: list[tuple[str, str, dict[str, Any], bool]] = [
    ("vit_b_16", "last_layer", {}, True),
    ("vit_b_16", "mist", {}, True),
    ("vit_b_16", "dtl", {}, False),
    ("resnet50", "last_layer", {}, False),
    ("resnet50", "parasite", {"ratio": 0.09}, False),
]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=64, help="training images, a multiple of the batch")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--small", action="store_true", help="networks of a few layers, to try this file")
    arguments = parser.parse_args()
    around = environment()
    rows, goals = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "data", arguments.images, arguments.resolution)
        for backbone, method, options, promised in CASES:
            row, found = measure(folder, backbone, method, options, arguments)
            rows.append(row)
            goals += found if promised else found[:1]
    settings = {key: value for key, value in vars(arguments).items() if key != "out"} | {"threads": 1}
    finish(arguments.out, tables={"Seconds of a step": rows}, environment=around, goals=goals, settings=settings)


def write_images(folder: Path, count: int, size: int) -> None:
    def images(seed: int, count: int) -> Iterator[tuple[bytes, int]]:
        random = np.random.default_rng(seed)
        for number in range(count):
            coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            coarse.resize((size * 3 // 2, size * 5 // 4)).save(buffer, "jpeg")
            yield buffer.getvalue(), number % CLASSES

    for seed, split in enumerate(("train", "validation")):
        classes = [f"class {number}" for number in range(CLASSES)]
        write_table(folder / split, images(seed, count if split == "train" else CLASSES), classes)


def measure(
    folder: Path, backbone: str, method: str, options: dict[str, Any], arguments: Any
) -> tuple[dict[str, Any], list[Goal]]:
    plain, _ = train(folder, backbone, method, options, arguments, cached=False)
    cached, job = train(folder, backbone, method, options, arguments, cached=True)
    steps = arguments.images // arguments.batch
    first = median(record.seconds for record in cached[:steps])
    without = median(record.seconds for record in plain[steps:])
    later = median(record.seconds for record in cached[steps:])
    plan = job.caches["task"]
    title = f"{backbone} {method}"
    row = {
        "task": title,
        "bytes per image": plan.row_bytes,
        "disk GB": plan.total_bytes / GB,
        "without": without,
        "first epoch": first,
        "later": later,
        "without/later": without / later,
        "first/without": first / without,
    }
    unequal = sum(one.loss != other.loss for one, other in zip(plain, cached, strict=True))
    return row, [
        at_most(f"{title}: losses that differ from those without a cache", unequal, 0),
        at_least(f"{title}: time of a step without a cache / with one, later epochs", without / later, 3.0),
    ]


def train(
    folder: Path, backbone: str, method: str, options: dict[str, Any], arguments: Any, cached: bool
) -> tuple[list[StepRecord], Job]:
    small: dict[str, dict[str, Any]] = {
        "vit_b_16": {"num_layers": 3, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64},
        "resnet50": {},
    }
    steps = arguments.epochs * arguments.images // arguments.batch
    size = {"image_size": arguments.resolution} if backbone == "vit_b_16" else {}
    task = {
        "name": "task",
        "data": str(folder / "data"),
        "method": method,
        "options": options,
        "num_classes": CLASSES,
        "resolution": arguments.resolution,
        "batch_size": arguments.batch,
        "validation_images": 1,
    }
    spec = {
        "name": "job",
        "backbone": {"name": backbone, "options": size | (small[backbone] if arguments.small else {})},
        "tasks": [task | ({"cache_features": str(folder / "cache")} if cached else {})],
        "train_shared": False,
        "steps": steps,
        "evaluate_every": steps,
        "optimizer": {"name": "adam", "rate": 1e-3},
        "engine": {"name": "local"},
        "directory": str(folder / "run"),
    }
    job = Job(load_spec(spec))
    records: list[StepRecord] = []
    store = CheckpointStore(job.spec.checkpoint_folder, job.spec.checkpoints.keep)
    ENGINES["local"](job, Driver(lambda new, _evaluations, _progress: records.extend(new), store))
    return records, job


if __name__ == "__main__":
    main()
