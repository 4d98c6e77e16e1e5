"""How long do K tasks on the same images take when what they share is computed once?

`PatchBank.all_tasks` is compared with K separate passes, which K fine-tuned networks would take, and with the K patched
models one after another: DTL (M = 7) and MIST on ViT-B/16 and parasites of ratio 0.09 on ResNet-50, at 224 px in
float32, for one image and for sixteen. The separate passes run through one network again and again, since its weights
are larger than any cache; nineteen networks would only take more memory. For MIST and parasites the bank is also
compared with one pass of the backbone and K side networks, each measured alone.

A machine's speed drifts within the minutes that nineteen passes take. Therefore half of the passes run before all_tasks
and half after it, and K of them count as K times their mean. The patched models take equally long, so only every third
of them runs. MIST is compared with the separate passes that are timed beside DTL. Ratios are computed within a turn;
the tables have their medians. `--device cuda` adds batches of four, and the images/s of one task as in DTL's table.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

import patches
from benchmarks._common import Goal, at_least, at_most, environment, finish, make_parser

RESOLUTION, CLASSES = 224, 100
COUNTS = (1, 2, 5, 19)
BATCHES = {"cpu": (1, 16), "cuda": (1, 4, 16)}
TURNS = {1: 5, 4: 5, 16: 1}
"""Batch -> turns in a round."""
SEPARATE, ONE_BY_ONE, TOGETHER, PARTS = "separate", "task by task", "all_tasks", "parts alone"
BACKBONE, SIDE = "backbone alone", "side network alone"
"""The two parts that PARTS is the sum of."""
TIMED = 20
"""Number of passes for the median of images/s, on a GPU only."""


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
TITLES = [case.title for case in CASES]
THROUGHPUT = (Case("vit_b_16", "full", "full"), DTL, Case("vit_b_16", "DTL+", "dtl_plus"), *CASES[1:])
LESS_TIME, WITHIN = 0.52, 1.25
"""Promised ratios with 19 tasks: DTL to separate passes, and the others to the sum of their parts."""
Seconds = dict[str, list[float]]
"""Way -> seconds for each of COUNTS."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=BATCHES, default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of tasks, ascending")
    parser.add_argument("--methods", nargs="+", choices=TITLES, default=TITLES)
    parser.add_argument("--batches", type=int, nargs="+", choices=TURNS, help="by default all of the device")
    arguments = parser.parse_args()
    around = environment()
    torch.set_num_threads(arguments.threads)
    counts, device = tuple(arguments.counts), arguments.device
    batches = arguments.batches or BATCHES[device]
    benches = [Bench(case, device, counts) for case in CASES if case.title in arguments.methods]
    taken: dict[tuple[str, int], list[Seconds]] = {}
    for number in range(arguments.rounds):
        separate: dict[tuple[str, int, int], list[float]] = {}
        for bench in benches:
            for batch in batches:
                for turn in range(TURNS[batch]):
                    known = separate.get((bench.case.backbone, batch, turn))
                    seconds = bench.take_turn(batch, number + turn, known)
                    separate[bench.case.backbone, batch, turn] = seconds[SEPARATE]
                    taken.setdefault((bench.case.title, batch), []).append(seconds)
        print(f"Round {number + 1} of {arguments.rounds}", flush=True)
    rows = [
        summary(title, batch, place, count, turns)
        for (title, batch), turns in taken.items()
        for place, count in enumerate(counts)
    ]
    tables = {"K tasks on the same images: medians over turns": rows}
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
            "turns_in_a_round": TURNS,
            "seconds": {f"{title}, batch {batch}": turns for (title, batch), turns in taken.items()},
        },
    )


class Bench:
    """One case with its tasks, and the ways to compute their answers."""

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
        self._first_tasks = [self._bank.tasks[:count] for count in counts]

    @torch.no_grad()
    def take_turn(self, batch: int, number: int, separate: list[float] | None) -> Seconds:
        """Time every way once; the turn's number decides which one begins.

        Args:
            separate: seconds of the separate passes, if they are known.
        """
        images = torch.randn(batch, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0))
        images = images.to(self._device)
        self._bank.all_tasks(images, ["task0"])
        passes = self._passes(images)
        if separate is not None:
            del passes[SEPARATE]
        names = list(passes)
        names = names[number % len(names) :] + names[: number % len(names)]
        before = {name: [self._time(one) for one in passes[name][::2]] for name in names}
        together = [self._time(partial(self._bank.all_tasks, images, tasks)) for tasks in self._first_tasks]
        after = {name: [self._time(one) for one in passes[name][1::2]] for name in reversed(names)}
        one = {name: mean(before[name] + after[name]) for name in names}
        seconds = {
            SEPARATE: separate or [count * one[SEPARATE] for count in self._counts],
            ONE_BY_ONE: [count * one[ONE_BY_ONE] for count in self._counts],
            TOGETHER: together,
        }
        if SIDE in one:
            seconds[PARTS] = [one[BACKBONE] + count * one[SIDE] for count in self._counts]
        return seconds

    def _passes(self, images: Tensor) -> dict[str, list[Callable[[], object]]]:
        """Return way -> its passes; the backbone alone has one for each half."""
        network = partial(self._backbone.network, images)
        passes: dict[str, list[Callable[[], object]]] = {
            ONE_BY_ONE: [partial(model, images) for model in self._models[::3]],
            SEPARATE: [network] * len(self._models),
        }
        if self.case is not DTL:  # whose tasks run blocks of the backbone themselves
            shared = self._models[0].shared_part(images)
            passes[BACKBONE] = [network, network]
            passes[SIDE] = [partial(model.own_part, images, shared) for model in self._models]
        return passes

    def _time(self, action: Callable[[], object]) -> float:
        start = time.perf_counter()
        action()
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def summary(title: str, batch: int, place: int, count: int, turns: list[Seconds]) -> dict[str, Any]:
    def ratio(to: str) -> float:
        return median(taken[TOGETHER][place] / taken[to][place] for taken in turns)

    return {
        "method": title,
        "batch": batch,
        "K": count,
        **{f"{way} s": median(taken[way][place] for taken in turns) for way in (SEPARATE, ONE_BY_ONE, TOGETHER)},
        f"all/{SEPARATE}": ratio(SEPARATE),
        f"all/{ONE_BY_ONE}": ratio(ONE_BY_ONE),
        f"all/{PARTS}": ratio(PARTS) if PARTS in turns[0] else None,
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
