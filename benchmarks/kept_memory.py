"""What does a training step on the CPU gain when its process keeps the memory that it frees?

Two processes train one network on the same generated images, one with glibc's defaults, the other after
`multitask.cluster.memory.keep_freed_memory`. They take turns of a few steps; the first step of a turn is not counted.
"""

import contextlib
import multiprocessing
import resource
import time
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torchvision.models import get_model

from benchmarks._common import at_most, environment, finish, make_parser
from multitask.cluster.memory import keep_freed_memory

ROWS = {"glibc's defaults": False, "freed memory kept": True}
TURN = 4
GOAL = 0.97


class Step(NamedTuple):
    ms: float
    page_faults: int
    memory_mb: float
    """Largest resident memory of the process so far."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="mobilenet_v2", help="of torchvision")
    parser.add_argument("--resolution", type=int, default=96, help="pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=15, help="of each process")
    arguments = parser.parse_args()
    around = environment()
    spawn = multiprocessing.get_context("spawn")
    network = arguments.model, arguments.resolution, arguments.batch
    ends: dict[str, Connection] = {}
    for name, keep in ROWS.items():
        ends[name], other = spawn.Pipe()
        spawn.Process(target=train_when_told, args=(other, keep, *network), daemon=True).start()
    turns: dict[str, list[list[Step]]] = {name: [] for name in ROWS}
    for turn in range(arguments.turns):
        for name in reversed(ROWS) if turn % 2 else ROWS:
            ends[name].send(TURN)
            turns[name].append(ends[name].recv())
    default, kept = ([median(step.ms for step in turn) for turn in turns[name]] for name in ROWS)
    ratios = [after / before for before, after in zip(default, kept, strict=True)]
    rows = [{"process": name, **summary([step for turn in found for step in turn])} for name, found in turns.items()]
    finish(
        arguments.out,
        tables={f"A step of {arguments.model}, {arguments.resolution} px, batch {arguments.batch}, one thread": rows},
        environment=around,
        goals=[at_most("Time of a step with freed memory kept / by default, median of turns", median(ratios), GOAL)],
        settings={"turns": arguments.turns, "steps_of_a_turn": TURN - 1, "ratios": sorted(ratios)},
    )


def train_when_told(told: Connection, keep: bool, model: str, resolution: int, batch: int) -> None:
    """Make as many steps as the connection asks for, and send the time and faults of all but the first."""
    torch.set_num_threads(1)
    if keep:
        keep_freed_memory()
    torch.manual_seed(0)
    network = get_model(model).train()
    images = torch.rand(batch, 3, resolution, resolution).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch)
    with contextlib.suppress(EOFError):  # the benchmark has closed the connection
        while True:
            steps = [one_step(network, images, labels) for _ in range(told.recv())]
            told.send(steps[1:])


def one_step(network: Any, images: torch.Tensor, labels: torch.Tensor) -> Step:
    start, faults = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    network.zero_grad()
    functional.cross_entropy(network(images), labels).backward()
    seconds, usage = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return Step(1000 * seconds, usage.ru_minflt - faults, usage.ru_maxrss / 1000)


def summary(steps: list[Step]) -> dict[str, float]:
    return {
        "step ms": median(step.ms for step in steps),
        "page faults": median(step.page_faults for step in steps),
        "memory MB": max(step.memory_mb for step in steps),
    }


if __name__ == "__main__":
    main()
