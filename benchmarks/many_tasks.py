"""How long do K tasks on the same images take when what they share is computed once?

`PatchBank.all_tasks` against K separate passes, which K fine-tuned networks would take, and against the K patched
models one after another: DTL (M = 7) and MIST on ViT-B/16, parasites of ratio 0.09 on ResNet-50, 224 px, float32, for
one image and for sixteen. For MIST and parasite the bank is also compared with one pass of the backbone and K side
networks.

A pass of one model takes as long as that of another one: passes of the backbone alone and of the patched models are
timed before and after each of the bank's, and K of them are K times their mean in the round. A backbone's weights are
larger than any cache, so that nineteen separate networks would take no longer than one nineteen times. Ratios are
within a round, and the tables have the medians over rounds. With `--device cuda` come batches of four, and images/s of
one task as in DTL's table.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from statistics import mean, median
from typing import Any

import torch

import patches
from benchmarks._common import Goal, at_least, at_most, environment, finish, make_parser

RESOLUTION, CLASSES = 224, 100
COUNTS = (1, 2, 5, 19)
BATCHES = {"cpu": (1, 16), "cuda": (1, 4, 16)}
REPEATS = {1: 5, 4: 5, 16: 2}
"""Batch -> how often a round goes through all numbers of tasks."""
SEPARATE, ONE_BY_ONE, TOGETHER, PARTS = "separate", "task by task", "all_tasks", "parts alone"
SIDE = "what a task computes itself"
TIMED = 20
"""Passes of which the median is taken for images/s, on a GPU only."""


@dataclass(frozen=True)
class Case:
    """K tasks of one method on one backbone."""

    backbone: str
    title: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)


DTL = Case("vit_b_16", "DTL", "dtl", {"first_block": 7})
CASES = (
    DTL,
    Case("vit_b_16", "MIST", "mist"),
    Case("resnet50", "parasite 0.09", "parasite", {"ratio": 0.09}),
)
THROUGHPUT = (Case("vit_b_16", "full", "full"), DTL, Case("vit_b_16", "DTL+", "dtl_plus"), *CASES[1:])
LESS_TIME, WITHIN = 0.52, 1.25
"""What was promised for DTL over separate passes, and for the others over their parts; both with 19 tasks."""
Seconds = dict[str, list[float]]
"""Way -> seconds for each number of tasks."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=BATCHES, default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of tasks, ascending")
    arguments = parser.parse_args()
    around = environment()
    torch.set_num_threads(arguments.threads)
    counts, device = tuple(arguments.counts), arguments.device
    benches = [Bench(case, device, counts) for case in CASES]
    taken: dict[tuple[str, int], list[Seconds]] = {}
    for number in range(arguments.rounds):
        for bench in benches:
            for batch in BATCHES[device]:
                taken.setdefault((bench.case.title, batch), []).append(bench.round(batch))
        print(f"Round {number + 1} of {arguments.rounds}", flush=True)
    rows = [
        summary(title, batch, place, count, rounds)
        for (title, batch), rounds in taken.items()
        for place, count in enumerate(counts)
    ]
    tables = {"K tasks on the same images: medians over rounds": rows}
    if device == "cuda":
        tables["Images/s of one task"] = [throughput_row(case, device) for case in THROUGHPUT]
    finish(
        arguments.out,
        tables=tables,
        environment=around | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
        goals=make_goals(rows, counts[-1]),
        settings={
            "rounds": arguments.rounds,
            "threads": arguments.threads,
            "device": device,
            "resolution": RESOLUTION,
            "classes": CLASSES,
            "repeats_in_a_round": REPEATS,
            "seconds": {f"{title}, batch {batch}": rounds for (title, batch), rounds in taken.items()},
        },
    )


class Bench:
    """One case with its tasks, and the ways to answer them."""

    def __init__(self, case: Case, device: str, counts: tuple[int, ...]) -> None:
        self.case = case
        self._device = device
        self._counts = counts
        self._backbone = patches.load_backbone(case.backbone, num_classes=CLASSES).to(device)
        self._bank = patches.PatchBank(self._backbone)
        self._models = [
            patches.attach(self._backbone, case.method, CLASSES, seed=seed, **case.options)
            for seed in range(counts[-1])
        ]
        for number, model in enumerate(self._models):
            self._bank.add(f"task{number}", model)

    @torch.no_grad()
    def round(self, batch: int) -> Seconds:
        """Every way in turn, as often as REPEATS says."""
        images = torch.randn(batch, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0))
        images = images.to(self._device)
        models = cycle(self._models)
        shared = self._models[0].shared_part(images)
        self._bank.all_tasks(images, ["task0"])
        passes: dict[str, list[float]] = {SEPARATE: [], ONE_BY_ONE: [], SIDE: []}
        together: dict[int, list[float]] = {count: [] for count in self._counts}

        def time_passes() -> None:
            model = next(models)
            passes[SEPARATE].append(self._time(partial(self._backbone.network, images)))
            passes[ONE_BY_ONE].append(self._time(partial(model, images)))
            passes[SIDE].append(self._time(partial(model.own_part, images, shared)))

        time_passes()
        for count in self._counts * REPEATS[batch]:
            together[count].append(self._time(partial(self._bank.all_tasks, images, self._bank.tasks[:count])))
            time_passes()
        of_one = {way: mean(seconds) for way, seconds in passes.items()}
        return {
            SEPARATE: [count * of_one[SEPARATE] for count in self._counts],
            ONE_BY_ONE: [count * of_one[ONE_BY_ONE] for count in self._counts],
            TOGETHER: [mean(together[count]) for count in self._counts],
            PARTS: [of_one[SEPARATE] + count * of_one[SIDE] for count in self._counts],
        }

    def _time(self, action: Callable[[], object]) -> float:
        start = time.perf_counter()
        action()
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def summary(title: str, batch: int, place: int, count: int, rounds: list[Seconds]) -> dict[str, Any]:
    def ratio(to: str) -> float:
        return median(taken[TOGETHER][place] / taken[to][place] for taken in rounds)

    return {
        "method": title,
        "batch": batch,
        "K": count,
        **{f"{way} s": median(taken[way][place] for taken in rounds) for way in (SEPARATE, ONE_BY_ONE, TOGETHER)},
        f"all/{SEPARATE}": ratio(SEPARATE),
        f"all/{ONE_BY_ONE}": ratio(ONE_BY_ONE),
        # DTL's tasks run blocks of the backbone themselves.
        f"all/{PARTS}": None if title == DTL.title else ratio(PARTS),
    }


def make_goals(rows: list[dict[str, Any]], count: int) -> list[Goal]:
    goals = []
    for row in rows:
        if row["K"] != count:
            continue
        name = f"{row['method']}, {count} tasks, batch {row['batch']}: time of all_tasks"
        if row["method"] == DTL.title:
            goals.append(at_least(f"{name}, share saved of separate passes", 1 - row[f"all/{SEPARATE}"], LESS_TIME))
        else:
            goals.append(
                at_most(f"{name} / one backbone pass and the side networks alone", row[f"all/{PARTS}"], WITHIN)
            )
    return goals


@torch.no_grad()
def throughput_row(case: Case, device: str) -> dict[str, Any]:
    backbone = patches.load_backbone(case.backbone, num_classes=CLASSES).to(device)
    model = patches.attach(backbone, case.method, CLASSES, **case.options)
    row: dict[str, Any] = {"backbone": case.backbone, "method": case.title}
    for batch in BATCHES[device]:
        images = torch.randn(batch, 3, RESOLUTION, RESOLUTION, device=device)
        spent = []
        for _ in range(TIMED):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(images)
            torch.cuda.synchronize()
            spent.append(time.perf_counter() - start)
        row[f"batch {batch}"] = batch / median(spent)
    return row


if __name__ == "__main__":
    main()
