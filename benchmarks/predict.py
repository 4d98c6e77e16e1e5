"""How close is `multitask predict` to what its loader and its network allow, each measured alone?

The photos are JPEGs made from the shipped photos of animals. Loading and computing one after the other would answer
1 / (1 / loader + 1 / network) images per second, where both use all cores. The function of the verb answers the photos
with an export, finding the files and writing a Parquet file included. The three take turns.
"""

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch import Tensor

import patches
from benchmarks._common import at_least, environment, finish, make_parser
from jobs.predict_verbs import find_photos, predict
from multitask.data import open_table
from patches.bank import BATCH_SIZE
from patches.images.reading import read_squares
from patches.images.resizing import network_input
from patches.prediction import answers_of

DATA = Path(__file__).parents[1] / "jobs" / "data" / "animals"
TASK, QUALITY, RESOLUTION = "animals", 90, 224
GOAL = 0.9


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--side", type=int, default=256, help="height and width of the photos, in pixels")
    parser.add_argument("--model", default="mobilenet_v2", help="of torchvision")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    around = environment()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder / "photos", arguments.images, arguments.side)
        write_export(folder / "export", arguments.model)
        variants = {
            "loader": lambda: load(folder),
            "network": lambda: compute(folder, arguments.images),
            "multitask predict": lambda: answer(folder),
        }
        rates: dict[str, list[float]] = {variant: [] for variant in variants}
        for _ in range(arguments.rounds):
            for variant, run in variants.items():
                rates[variant].append(arguments.images / seconds(run))
    bounds = [1 / (1 / loader + 1 / network) for loader, network in zip(rates["loader"], rates["network"], strict=True)]
    shares = [rate / bound for rate, bound in zip(rates["multitask predict"], bounds, strict=True)]
    rates["1 / (1 / loader + 1 / network)"] = bounds
    finish(
        arguments.out,
        tables={
            f"{arguments.model}, {RESOLUTION} px, {arguments.images:,} photos of {arguments.side} px": [
                {"what": what, "images/s, median": median(found), "min": min(found), "max": max(found)}
                for what, found in rates.items()
            ]
        },
        environment=around,
        goals=[at_least("images/s of predict / (1 / (1 / loader + 1 / network))", median(shares), GOAL)],
        settings={
            **{key: value for key, value in vars(arguments).items() if key != "out"},
            "threads": torch.get_num_threads(),
        },
    )


def write_photos(folder: Path, images: int, side: int) -> None:
    """Write the shipped photos as JPEGs of another size, again and again until there are enough."""
    folder.mkdir()
    contents = list(islice(_jpegs(side), images))
    for number, content in enumerate(islice(cycle(contents), images)):
        (folder / f"{number:06d}.jpg").write_bytes(content)


def _jpegs(side: int) -> Iterator[bytes]:
    for group in open_table(str(DATA / "train")).groups():
        for place in range(len(group)):
            file = io.BytesIO()
            photo = Image.open(io.BytesIO(group.encoded(place).numpy().tobytes()))
            photo.convert("RGB").resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=QUALITY)
            yield file.getvalue()


def write_export(folder: Path, model: str) -> None:
    """Write an export with one task and random weights, on which the speed does not depend."""
    classes = open_table(str(DATA / "train"), verify=False).classes
    backbone = patches.load_backbone(model)
    backbone.save(folder / "backbone.safetensors")
    patched = patches.attach(backbone, "scale_bias+last_layer", len(classes))
    preprocessing = patches.Preprocessing(RESOLUTION, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    patches.save_bundle(patched, folder / f"{TASK}.patch", classes=classes, preprocessing=preprocessing.as_json())


def load(folder: Path) -> None:
    """Read, decode and resize all photos, on all cores."""
    preprocessing = patches.open_export(folder / "export").preprocessing(TASK)
    for square in read_squares(find_photos([folder / "photos"]), preprocessing):
        assert isinstance(square, Tensor)


def compute(folder: Path, images: int) -> None:
    """Answer one batch again and again, from pixels that are in memory, on all cores."""
    bank = patches.open_export(folder / "export")
    preprocessing, classes = bank.preprocessing(TASK), bank.classes(TASK)
    squares = torch.randint(0, 256, (BATCH_SIZE, RESOLUTION, RESOLUTION, 3), dtype=torch.uint8)
    for start in range(0, images, BATCH_SIZE):
        batch = squares[: images - start]
        logits = bank.all_tasks(network_input(batch, preprocessing, "cpu"), [TASK])[TASK]
        answers_of([TASK] * len(batch), classes, logits)


def answer(folder: Path) -> None:
    """Answer all photos as the verb does, without what it prints."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        predict(folder / "export", [folder / "photos"], TASK, folder / "answers.parquet")


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
