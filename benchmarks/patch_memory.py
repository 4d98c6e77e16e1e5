"""What do K patches on one backbone cost, against K copies of the network?"""

import copy
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import patches
from benchmarks._common import Goal, main

METHOD, CLASSES, REPEATS = "scale_bias+last_layer", 100, 7
BACKBONES = ("mobilenet_v2", "resnet50", "vit_b_16")
TASKS = (1, 5, 20)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages under the tensors."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def median_ms(action: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


def state(model: torch.nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())


def measure() -> tuple[list[dict[str, Any]], list[Goal]]:
    rows, goals = [], []
    for name in BACKBONES:
        backbone = patches.load_backbone(name)
        attach_ms = median_ms(lambda backbone=backbone: patches.attach(backbone, METHOD, CLASSES))  # type: ignore[misc]
        copy_ms = median_ms(lambda backbone=backbone: copy.deepcopy(backbone.network))  # type: ignore[misc]
        copied = storage_bytes(state(copy.deepcopy(backbone.network)))
        with tempfile.TemporaryDirectory() as folder:
            bundle, whole = Path(folder) / "task.patch", Path(folder) / "model.safetensors"
            model = patches.attach(backbone, METHOD, CLASSES)
            patches.save_bundle(model, bundle, classes=[str(label) for label in range(CLASSES)], preprocessing={})
            safetensors.torch.save_file(
                {key: value.clone() for key, value in model.network.state_dict().items()}, whole
            )
            file_ratio = bundle.stat().st_size / whole.stat().st_size
        patch_bytes = storage_bytes(model.private_state().values())
        for tasks in TASKS:
            models = [patches.attach(backbone, METHOD, CLASSES) for _ in range(tasks)]
            held = storage_bytes([*state(backbone.network), *(tensor for model in models for tensor in state(model))])
            rows.append(
                {
                    "backbone": name,
                    "tasks": tasks,
                    "MB held": held / 1e6,
                    "of K copies": held / (tasks * copied),
                    "bundle / model file": file_ratio,
                    "attach ms": attach_ms,
                    "deepcopy ms": copy_ms,
                }
            )
        promised = storage_bytes(state(backbone.network)) + TASKS[-1] * patch_bytes
        goals.append(Goal(f"{name}: 20 tasks held / (backbone + 20 patches)", held / promised, 1.001, at_least=False))
        goals.append(Goal(f"{name}: attach / deepcopy", attach_ms / copy_ms, 1.0, at_least=False))
    return rows, goals


if __name__ == "__main__":
    main(__doc__, measure)
