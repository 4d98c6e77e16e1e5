"""What does learning a task from MIST's maps take at the edge: bytes per image, resident memory, time?

A random ViT-B/16 gathers maps of random images. Separate processes, which hold no backbone, train on the maps in
batches of 32. `added` is the peak of resident memory minus the resident memory after the imports.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

import patches
from benchmarks._common import Goal, at_most, environment, finish, make_parser
from patches.edge import CHUNK, MAPS, predict
from patches.features import FeatureFile, Rows, write_features
from patches.methods.mist import Edge, Gather

BATCH = 32
CLASSES = 100
KNOWN_BYTES = {"float32": 605_184, "float16": 302_592}
HEAVY = ("torchvision", "ray", "mlflow", "multitask")
MB = 1e6

# What the process at the edge runs; the straightforward way holds a whole batch and uses torch's optimiser.
CHILD = """
import json, sys, time
import torch
from patches.bundle import save_bundle
from patches.edge import make_edge, train_edge
from patches.features import FeatureFile

def resident(name):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(name))

path, bundle, way, chunk, epochs = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
torch.set_num_threads(1)
imports = resident("VmRSS")
start = time.perf_counter()
maps = FeatureFile(path)
edge = make_edge(maps)
if way == "straightforward":
    optimizer = torch.optim.Adam(edge.parameters(), lr=1e-3)
    steps = 0
    for _ in range(epochs):
        for places in torch.randperm(len(maps)).split(32):
            x = maps.layouts["maps"].empty(len(places))
            maps.read("maps", places.numpy(), x, range(len(places)))
            optimizer.zero_grad()
            labels = torch.from_numpy(maps.labels[places.numpy()])
            torch.nn.functional.cross_entropy(edge(x), labels).backward()
            optimizer.step()
            steps += 1
else:
    steps = len(train_edge(edge, maps, epochs=epochs, rate=1e-3, batch_size=32, chunk=chunk))
save_bundle(edge, bundle, classes=maps.about["classes"], preprocessing=maps.about["preprocessing"])
print(json.dumps({
    "steps": steps,
    "seconds": time.perf_counter() - start,
    "imports": imports,
    "peak": resident("VmHWM"),
    "modules": [name for name in sys.argv[6:] if name in sys.modules],
}))
"""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=2 * BATCH, help="a multiple of 32")
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    around = environment()
    torch.set_num_threads(1)
    goals = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backbone = patches.load_backbone("vit_b_16", num_classes=1000)
        x = torch.randn(arguments.images, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        maps = torch.cat([Gather(backbone)(part) for part in x.split(BATCH)])
        messages = []
        for dtype, known in KNOWN_BYTES.items():
            write(folder / f"{dtype}.arrow", backbone, maps.to(getattr(torch, dtype)))
            measured = message_bytes(folder / f"{dtype}.arrow", arguments.images)
            messages.append({"dtype": dtype, "bytes per image": measured, "known": known})
            goals.append(at_most(f"bytes per image, {dtype}", measured, known))
        del maps
        rows = []
        for way, dtype, chunk in [
            ("straightforward", "float32", BATCH),
            ("edge", "float32", BATCH),
            ("edge", "float32", CHUNK),
            ("edge", "float16", CHUNK),
            ("edge", "float32", 1),
        ]:
            found = child(folder, way, dtype, chunk, arguments.epochs)
            rows.append(
                {
                    "way": way,
                    "maps": dtype,
                    "images held": chunk,
                    "imports MB": found["imports"] / MB,
                    "peak MB": found["peak"] / MB,
                    "added MB": (found["peak"] - found["imports"]) / MB,
                    "s/step": found["seconds"] / found["steps"],
                }
            )
            if (way, chunk) == ("edge", CHUNK):
                goals.append(at_most(f"MB added at batch {BATCH}, {dtype} maps", rows[-1]["added MB"], 400))
                goals.append(at_most(f"of {', '.join(HEAVY)}: imported, {dtype}", len(found["modules"]), 0))
                goals.append(same_logits(folder, backbone, x[:4], dtype))
    settings = {"images": arguments.images, "epochs": arguments.epochs, "batch_size": BATCH, "threads": 1}
    tables = {"Message": messages, "Training at the edge": rows}
    finish(arguments.out, tables=tables, environment=around, goals=goals, settings=settings)


def write(path: Path, backbone: patches.Backbone, maps: torch.Tensor) -> None:
    classes = [f"class {number}" for number in range(CLASSES)]
    about = {"backbone": backbone.identity(), "k": backbone.num_blocks, "classes": classes, "preprocessing": {}}
    numbers = np.arange(len(maps))
    write_features(
        path,
        about,
        (Rows(part, part % CLASSES, {MAPS: maps[part]}) for part in np.split(numbers, len(maps) // BATCH)),
    )


def message_bytes(path: Path, images: int) -> float:
    """Return the bytes of one image, from the table's buffers."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()[MAPS].nbytes / images


def child(folder: Path, way: str, dtype: str, chunk: int, epochs: int) -> dict[str, Any]:
    paths = [str(folder / f"{dtype}.arrow"), str(folder / f"{dtype}.patch")]
    command = [sys.executable, "-c", CHILD, *paths, way, str(chunk), str(epochs), *HEAVY]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def same_logits(folder: Path, backbone: patches.Backbone, x: torch.Tensor, dtype: str) -> Goal:
    """Compare the bundle on the full model with the edge network on the stored maps of the same images."""
    model = patches.load_bundle(folder / f"{dtype}.patch", backbone)
    info = patches.inspect_bundle(folder / f"{dtype}.patch")
    edge = Edge(info.backbone, info.num_classes, **info.options)
    edge.load_state_dict(model.private_state())
    maps = FeatureFile(folder / f"{dtype}.arrow")
    with torch.no_grad():
        from_images, from_maps = model(x), predict(edge, maps, chunk=len(x))[: len(x)]
    difference = ((from_images - from_maps).abs().max() / from_images.abs().max()).item()
    # Maps that were rounded to half precision cannot give the same bits.
    return at_most(
        f"largest relative difference of logits, {dtype} maps", difference, 0.0 if dtype == "float32" else 1e-2
    )


if __name__ == "__main__":
    main()
