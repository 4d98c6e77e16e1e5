"""What do K tasks on one backbone cost in memory, on disk and to attach?

For each backbone and K, K patches `scale_bias+last_layer` with 100 classes are attached to one backbone of 1000
classes, and compared with K whole networks of 100 classes.
"""

import copy
import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

import patches
from benchmarks._common import Goal, at_most, environment, finish, make_parser
from patches.files import write_atomic

BACKBONES = ("mobilenet_v2", "resnet50", "vit_b_16")
TASKS = (1, 5, 20)
METHOD = "scale_bias+last_layer"
CLASSES = 100
RESIDENT = ("mobilenet_v2", 20)
MB = 1e6
STATM = Path("/proc/self/statm")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="timed repetitions of attach and deepcopy")
    arguments = parser.parse_args()
    around = environment()
    torch.set_num_threads(1)
    memory: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    goals: list[Goal] = []
    for name in BACKBONES:
        backbone = patches.load_backbone(name, num_classes=1000)
        memory += measure_memory(backbone)
        costs.append(measure_cost(backbone, arguments.repeats))
        goals += [
            at_most(
                f"{name}: bytes held with {TASKS[-1]} patches / bytes of backbone and patches",
                memory[-1]["held/parts"],
                1.001,
            ),
            at_most(f"{name}: time of attach / time of copy.deepcopy", costs[-1]["attach/deepcopy"], 1.0),
        ]
    tables = {"Tensor storage of K tasks": memory, "One task": costs}
    if STATM.exists():
        tables[f"Resident memory, {RESIDENT[1]} tasks"] = [measure_resident(*RESIDENT)]
    settings = {"method": METHOD, "classes": CLASSES, "repeats": arguments.repeats, "threads": 1}
    finish(arguments.out, tables=tables, environment=around, goals=goals, settings=settings)


def measure_memory(backbone: patches.Backbone) -> list[dict[str, Any]]:
    """Return one row for each number of tasks."""
    models = [attach(backbone, seed) for seed in range(TASKS[-1])]
    whole = storage_bytes([copy.deepcopy(models[0].network)])
    rows = []
    for tasks in TASKS:
        held = storage_bytes([backbone.network, *(model.network for model in models[:tasks])])
        private = sum(tensor_bytes(model.private_state().values()) for model in models[:tasks])
        parts = tensor_bytes(backbone.network.state_dict().values()) + private
        rows.append(
            {
                "backbone": backbone.name,
                "tasks": tasks,
                "held MB": held / MB,
                "whole networks MB": tasks * whole / MB,
                "held/whole": held / (tasks * whole),
                "held/parts": held / parts,
            }
        )
    return rows


def measure_cost(backbone: patches.Backbone, repeats: int) -> dict[str, Any]:
    bundle, whole = file_bytes(attach(backbone, 0))
    attach_ms, deepcopy_ms = timings([lambda: attach(backbone, 0), lambda: copy.deepcopy(backbone.network)], repeats)
    return {
        "backbone": backbone.name,
        "bundle kB": bundle / 1e3,
        "whole file kB": whole / 1e3,
        "bundle/whole": bundle / whole,
        "attach ms": attach_ms,
        "deepcopy ms": deepcopy_ms,
        "attach/deepcopy": attach_ms / deepcopy_ms,
    }


def measure_resident(name: str, tasks: int) -> dict[str, Any]:
    return {
        "backbone": name,
        "patches MB": median(in_new_process(resident_growth, name, tasks, "patches") for _ in range(3)) / MB,
        "whole networks MB": median(in_new_process(resident_growth, name, tasks, "whole") for _ in range(3)) / MB,
    }


def attach(backbone: patches.Backbone, seed: int) -> patches.PatchedModel:
    return patches.attach(backbone, METHOD, CLASSES, seed=seed)


def storage_bytes(networks: Iterable[nn.Module]) -> int:
    """Return the bytes of the distinct storages under all parameters and buffers."""
    sizes = {}
    for network in networks:
        for tensor in chain(network.parameters(), network.buffers()):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def file_bytes(model: patches.PatchedModel) -> tuple[int, int]:
    """Return the sizes of the task's bundle and of a safetensors file with its whole network."""
    with tempfile.TemporaryDirectory() as folder:
        bundle, whole = Path(folder, "task.patch"), Path(folder, "whole.safetensors")
        patches.save_bundle(
            model,
            bundle,
            classes=[f"class {index}" for index in range(CLASSES)],
            preprocessing={"resolution": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        )
        state = {name: tensor.contiguous() for name, tensor in model.network.state_dict().items()}
        write_atomic(whole, safetensors.torch.save(state))
        return bundle.stat().st_size, whole.stat().st_size


def timings(actions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Return the median milliseconds of each action. The actions take turns, after one turn that is not measured."""
    spent: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats + 1):
        for action, times in zip(actions, spent, strict=True):
            gc.collect()
            start = time.perf_counter()
            made = action()
            times.append(1000 * (time.perf_counter() - start))
            del made
    return [median(times[1:]) for times in spent]


def in_new_process(function: Callable[..., int], *arguments: Any) -> int:
    """Call a function in a new process, because memory that this one has freed and uses again would hide growth."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident_growth(name: str, tasks: int, kind: Literal["patches", "whole"]) -> int:
    """Return the bytes by which the process grows when K more models are made beside a first one."""
    torch.set_num_threads(1)
    backbone = patches.load_backbone(name, num_classes=1000)
    first = attach(backbone, 0)
    gc.collect()
    before = resident_bytes()
    if kind == "patches":
        made: list[nn.Module] = [attach(backbone, seed) for seed in range(tasks)]
    else:
        made = [copy.deepcopy(first.network) for _ in range(tasks)]
    gc.collect()
    growth = resident_bytes() - before
    del made
    return growth


def resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
