"""How much memory does a training step of a side network take, against full fine-tuning?

The networks are ViT-B/16 and ResNet-50 at 224 px in float32, with AdamW. Every row is measured in a process of its own.
`Saved tensors` is the most memory that autograd holds at one time for the backward pass, including what it recomputes:
each storage counts once, parameters and buffers do not count. The training peak is the sum of weights, gradients,
AdamW's two moments and saved tensors, which is how most figures of the papers are computed. `Resident` is the highest
growth of the process in two steps beyond its memory after the imports.

MIST has three rows: one for one process, and one for each of its two sides; the server's side trains nothing. `--device
cuda` adds the highest allocated memory of a training step and of a test pass, and the milliseconds per image of both,
as in the papers' tables.
"""

import gc
import multiprocessing
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import patches
from benchmarks._common import Goal, at_most, environment, finish, make_parser
from patches.methods.mist import Edge, Gather

MB = 1e6
RESOLUTION, CLASSES = 224, 100
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TIMED = 10
"""Number of repetitions for the median, on a GPU only."""
FULL, SERVER, EDGE = "full fine-tuning", "MIST, server", "MIST, edge"


@dataclass(frozen=True)
class Row:
    """One way to train one backbone."""

    backbone: str
    title: str
    method: str
    """A method of `patches.attach`, or one of the titles above for a row without a patch."""
    options: dict[str, Any] = field(default_factory=dict)


ROWS = (
    Row("vit_b_16", FULL, FULL),
    Row("vit_b_16", "linear probe", "last_layer"),
    Row("vit_b_16", "DTL", "dtl"),
    Row("vit_b_16", "DTL+", "dtl_plus"),
    Row("vit_b_16", "DTL+*", "dtl_plus_star"),
    Row("vit_b_16", "MIST", "mist"),
    Row("vit_b_16", SERVER, SERVER),
    Row("vit_b_16", EDGE, EDGE),
    Row("resnet50", FULL, FULL),
    Row("resnet50", "linear probe", "last_layer"),
    Row("resnet50", "parasite 0.09", "parasite", {"ratio": 0.09}),
    Row("resnet50", "parasite 0.2", "parasite", {"ratio": 0.2}),
)
GOALS = (
    ("vit_b_16", "DTL", "peak/full", 0.33),
    ("vit_b_16", "DTL", "saved/full", 0.40),
    ("resnet50", "parasite 0.09", "peak/full", 0.25),
)
"""Backbone, row, column, and the largest value that was promised."""
Model = Callable[[Tensor], Tensor]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--vit-batch", type=int, default=32, help="the paper's is 32")
    parser.add_argument("--resnet-batch", type=int, default=64, help="the paper's is 64")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    batches = {"vit_b_16": arguments.vit_batch, "resnet50": arguments.resnet_batch}
    around = environment()
    rows = []
    for row in ROWS:
        measured = in_new_process(row, batches[row.backbone], arguments.device, arguments.threads)
        rows.append(measured)
        print(f"{row.backbone}, {row.title}: {measured}", flush=True)
    for measured in rows:
        full = next(row for row in rows if (row["backbone"], row["row"]) == (measured["backbone"], FULL))
        measured["saved/full"] = measured["saved"] / full["saved"]
        measured["peak/full"] = measured["peak"] / full["peak"]
        measured["resident/full"] = measured["resident"] / full["resident"]
    settings = {"batches": batches, "resolution": RESOLUTION, "classes": CLASSES, "threads": arguments.threads}
    finish(
        arguments.out,
        tables={
            f"Training memory in MB, {name}, batch {batch}": [
                {key: value for key, value in row.items() if key != "backbone"}
                for row in rows
                if row["backbone"] == name
            ]
            for name, batch in batches.items()
        },
        environment=around | ({"gpu": torch.cuda.get_device_name()} if arguments.device == "cuda" else {}),
        goals=make_goals(rows),
        settings=settings | {"device": arguments.device},
    )


def make_goals(rows: list[dict[str, Any]]) -> list[Goal]:
    names = {"peak/full": "training peak", "saved/full": "saved tensors"}
    return [
        at_most(
            f"{backbone}, {title}: {names[column]} / that of full fine-tuning",
            next(row[column] for row in rows if (row["backbone"], row["row"]) == (backbone, title)),
            goal,
        )
        for backbone, title, column, goal in GOALS
    ]


def in_new_process(row: Row, batch: int, device: str, threads: int) -> dict[str, Any]:
    """Call a function in a new process, because memory that one row has freed would hide another row's growth."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, row, batch, device, threads).result()


def measure(row: Row, batch: int, device: str, threads: int) -> dict[str, Any]:
    """Measure one row of the table, without the ratios."""
    torch.set_num_threads(threads)
    warm_up_kernels(device)
    before = resident_bytes("VmRSS")
    CLEAR.write_text("5")  # resets the peak of the resident size
    module, model, inputs = build(row, batch, device)
    targets = torch.zeros(batch, dtype=torch.long, device=device)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    state = list(chain(module.parameters(), module.buffers()))
    gc.collect()
    saved = Saved(besides=state)
    if trained:
        optimizer = torch.optim.AdamW(trained)
        module.train()
        step = partial(train_step, model, optimizer, inputs, targets)
        step()
        with torch.autograd.graph.saved_tensors_hooks(saved.note, Held.release):
            step()
        slots = sum(bytes_of(slot) for values in optimizer.state.values() for slot in values.values())
    else:
        step = partial(test_pass, module, model, inputs)
        step()
        slots = 0
    weights, gradients = sum(map(bytes_of, state)), sum(map(bytes_of, trained))
    measured = {
        "backbone": row.backbone,
        "row": row.title,
        "trained": sum(parameter.numel() for parameter in trained),
        "weights": weights / MB,
        "gradients": gradients / MB,
        "AdamW": slots / MB,
        "saved": saved.most / MB,
        "peak": (weights + gradients + slots + saved.most) / MB,
        "resident": (resident_bytes("VmHWM") - before) / MB,
    }
    if device == "cuda":
        train = on_gpu(step, batch, "train") if trained else dict.fromkeys(("train GB", "train ms/image"))
        measured |= train | on_gpu(partial(test_pass, module, model, inputs), batch, "test")
    return measured


def build(row: Row, batch: int, device: str) -> tuple[nn.Module, Model, Tensor]:
    """Return the module of the row's tensors, the function that gives logits, and the function's input."""
    images = torch.randn(batch, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0)).to(device)
    if row.method == EDGE:
        # The backbone lies in another process, so only its hash is known here.
        options = patches.families.FAMILIES[row.backbone].options
        identity = {"name": row.backbone, "options": {**options, "num_classes": 1000}, "content_hash": ""}
        edge = Edge(identity, CLASSES).to(device)
        tokens = 1 + (RESOLUTION // options["patch_size"]) ** 2
        return edge, edge, torch.randn(batch, tokens, options["hidden_dim"]).to(device)
    backbone = patches.load_backbone(row.backbone, num_classes=CLASSES).to(device)
    if row.method == SERVER:
        backbone.network.requires_grad_(False)
        return backbone.network, Gather(backbone), images
    if row.method == FULL:
        return backbone.network, backbone.network, images
    model = patches.attach(backbone, row.method, CLASSES, **row.options)
    return model.network, model, images


def train_step(model: Model, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()


def test_pass(module: nn.Module, model: Model, inputs: Tensor) -> None:
    module.eval()
    with torch.no_grad():
        model(inputs)


class Saved:
    """Bytes that autograd holds now and at most, each storage once, without the storages of `besides`."""

    def __init__(self, besides: list[Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in besides}
        self._holders: Counter[int] = Counter()
        self._now = self.most = 0

    def note(self, tensor: Tensor) -> "Held":
        held, storage = Held(tensor), tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._count(storage.data_ptr(), storage.nbytes(), 1)
            weakref.finalize(held, self._count, storage.data_ptr(), storage.nbytes(), -1)
        return held

    def _count(self, address: int, nbytes: int, change: int) -> None:
        before = self._holders[address]
        self._holders[address] += change
        if 0 in (before, before + change):
            self._now += change * nbytes
            self.most = max(self.most, self._now)


class Held:
    """The object that autograd keeps in place of a tensor, for as long as it would keep the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def release(self) -> Tensor:
        return self.tensor


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def warm_up_kernels(device: str) -> None:
    """Start thread pools, an optimiser's imports and a GPU's context, which any training has."""
    x = torch.randn(256, 256, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([x])
    (x @ x).sum().backward()
    optimizer.step()


def on_gpu(step: Callable[[], None], batch: int, title: str) -> dict[str, float]:
    """Return the highest allocated memory and the time per image."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    spent = []
    for _ in range(TIMED):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        spent.append(1000 * (time.perf_counter() - start) / batch)
    return {f"{title} GB": torch.cuda.max_memory_allocated() / 1e9, f"{title} ms/image": median(spent)}


def resident_bytes(name: str) -> int:
    """Return VmRSS, the resident bytes now, or VmHWM, their peak."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


if __name__ == "__main__":
    main()
