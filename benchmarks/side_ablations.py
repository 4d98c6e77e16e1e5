"""Which parts of the side networks matter, and do they beat a linear probe on the same frozen features?

A small ViT and a ResNet-18 are trained here on Fashion-MNIST and digits together. The task is animals, which they have
not seen, with 2,000 training images that the seed draws. Every variant of the papers' ablations trains from the frozen
backbone's outputs, which are computed once. It uses the rate of its method, which is the best of three for the method's
first variant, by the validation images with the first seed. The linear probe is logistic regression, trained to
convergence, with the weight decay and, on the ViT, the readout (class token or mean of the patches) that are best on
the validation images. Test accuracies are in %.
"""

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import patches
from benchmarks._common import Goal, at_least, environment, finish, make_parser
from multitask.data import eval_batches, open_table

DATA = Path(__file__).parents[1] / "jobs" / "data"
SOURCES, TARGET = ("fashion", "digits"), "animals"
CLASSES, RESOLUTION = 10, 28
VIT, RESNET = "vit_b_16", "resnet18"
BACKBONES: dict[str, dict[str, Any]] = {
    VIT: {"image_size": RESOLUTION, "patch_size": 4, "num_layers": 4, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128},
    RESNET: {},
}
PRETRAINING = {VIT: (8, 2e-3, 2), RESNET: (3, 1e-3, 5)}
"""Backbone -> epochs, rate, and n where it sees every n-th image."""
DECAYS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)
SEEDS = (0, 1, 2)
BATCH = 64
POINTS = 2.0
"""Points by which each method was promised to beat the linear probe."""


@dataclass(frozen=True)
class Variant:
    """One row of the table. A method's first variant has the method's defaults, and the goals are about it."""

    method: str
    title: str
    options: dict[str, Any] = field(default_factory=dict)


RATES = {"dtl": (1e-2, 3e-2, 1e-1), "mist": (3e-3, 1e-2, 3e-2), "parasite": (1e-3, 3e-3, 1e-2)}
BEST_RATIO = 0.2
MEAN = {"readout": "mean"}
"""As the linear probe reads this ViT, and as DTL does; the paper leaves MIST's readout open."""
VARIANTS = {
    VIT: (
        Variant("dtl", "M 2, rank 2"),
        Variant("dtl", "without θ", {"theta": False}),
        Variant("dtl", "rank 1", {"rank": 1}),
        Variant("dtl", "rank 4", {"rank": 4}),
        Variant("dtl", "M 1", {"first_block": 1}),
        Variant("dtl", "M 3", {"first_block": 3}),
        Variant("dtl", "M 4", {"first_block": 4}),
        Variant("dtl_plus", "DTL+, kernel 3", {"kernel_size": 3}),
        Variant("dtl_plus_star", "DTL+*, kernel 3", {"kernel_size": 3}),
        Variant("mist", "gather, 4 attention blocks", MEAN),
        Variant("mist", "no gather", MEAN | {"gather": False}),
        Variant("mist", "MLP blocks", MEAN | {"block": "mlp"}),
        Variant("mist", "depthwise blocks", MEAN | {"block": "depthwise"}),
        Variant("mist", "k 1", MEAN | {"k": 1}),
        Variant("mist", "k 3", MEAN | {"k": 3}),
        Variant("mist", "class token", {"readout": "class_token"}),
    ),
    RESNET: (
        Variant("parasite", f"ratio {BEST_RATIO}", {"ratio": BEST_RATIO}),
        Variant("parasite", "ratio 0.05", {"ratio": 0.05}),
        Variant("parasite", "ratio 0.1", {"ratio": 0.1}),
        Variant("parasite", "ratio 0.4", {"ratio": 0.4}),
        Variant("parasite", "addition", {"ratio": BEST_RATIO, "join": "add"}),
        Variant("parasite", "random initialisation", {"ratio": BEST_RATIO, "init": "random"}),
        Variant("parasite", "zeroed host", {"ratio": BEST_RATIO, "zero_host": True}),
    ),
}
Accuracies = dict[str, float]
"""Split -> percent of its images that are right."""


@dataclass(frozen=True)
class Split:
    images: Tensor
    labels: Tensor
    outputs: Mapping[str, Mapping[int, Tensor]]
    """Backbone -> step -> its output on every image."""


@dataclass(frozen=True)
class Study:
    """The data that every run reads; processes share the tensors' memory."""

    backbones: Mapping[str, patches.Backbone]
    splits: Mapping[str, Split]
    train_images: int
    epochs: Mapping[str, int]
    """Backbone -> epochs of a variant on it."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="with one thread each")
    parser.add_argument("--epochs", type=int, nargs=2, default=(15, 6), metavar=("VIT", "RESNET"))
    parser.add_argument("--train-images", type=int, default=2000)
    parser.add_argument("--shrink", type=int, default=1, help="divides the backbones' images, to try this file")
    arguments = parser.parse_args()
    around, start = environment(), time.perf_counter()
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context, initializer=set_up) as pool:
        trained = {name: pool.submit(pretrain, name, arguments.shrink) for name in BACKBONES}
        backbones = {name: future.result() for name, future in trained.items()}
    print(f"Backbones trained after {time.perf_counter() - start:.0f} s", flush=True)
    torch.set_num_threads(arguments.processes)
    splits = {split: frozen_split(split, backbones) for split in ("train", "validation", "test")}
    epochs = dict(zip(BACKBONES, arguments.epochs, strict=True))
    study = Study(backbones, splits, arguments.train_images, epochs)
    with ProcessPoolExecutor(arguments.processes, mp_context=context, initializer=set_up, initargs=(study,)) as pool:
        probing = {title: [pool.submit(probe, title, seed) for seed in SEEDS] for title in PROBES}
        probes = {title: summary([future.result() for future in futures]) for title, futures in probing.items()}
        print(f"Linear probes: {probes}", flush=True)
        rows = run_variants(pool, study)
    tables = {
        "Linear probes": [{"backbone": PROBES[title][0], "features": title, **row} for title, row in probes.items()],
        f"Variants, {arguments.train_images} images of {TARGET}": rows,
    }
    finish(
        arguments.out,
        tables=tables,
        environment=around,
        goals=make_goals(rows, probes),
        settings={
            "sources": SOURCES,
            "target": TARGET,
            "backbones": BACKBONES,
            "pretraining": PRETRAINING,
            "shrink": arguments.shrink,
            "train_images": arguments.train_images,
            "epochs": epochs,
            "batch": BATCH,
            "seeds": SEEDS,
            "rates": RATES,
            "weight_decays_of_the_probe": DECAYS,
            "processes": arguments.processes,
            "seconds": time.perf_counter() - start,
        },
    )


# The backbones and what they give


def pretrain(name: str, shrink: int) -> patches.Backbone:
    """Train a backbone that distinguishes the classes of all sources."""
    epochs, rate, every = PRETRAINING[name]
    parts = [read(source, "train") for source in SOURCES]
    images = torch.cat([images for images, _ in parts])[:: every * shrink]
    labels = torch.cat([labels + CLASSES * number for number, (_, labels) in enumerate(parts)])[:: every * shrink]
    backbone = patches.load_backbone(name, num_classes=CLASSES * len(SOURCES), **BACKBONES[name])
    network = backbone.network.train()
    fit(lambda rows: network(images[rows]), labels, list(network.parameters()), epochs=epochs, rate=rate, seed=0)
    network.eval()
    return backbone


def read(name: str, split: str) -> tuple[Tensor, Tensor]:
    """Return all images (n, 3, 28, 28) from -1 to 1 and all labels (n,) of a table."""
    half = (0.5, 0.5, 0.5)
    table = open_table(str(DATA / name / split))
    batches = list(eval_batches(table, batch_size=1000, resolution=RESOLUTION, mean=half, std=half))
    images = torch.cat([batch.images() for batch in batches]).contiguous()
    return images, torch.cat([batch.labels for batch in batches])


@torch.no_grad()
def frozen_split(split: str, backbones: Mapping[str, patches.Backbone]) -> Split:
    images, labels = read(TARGET, split)
    outputs = {}
    for name, backbone in backbones.items():
        steps = range(len(backbone.steps) - 1)
        parts = [dict(backbone.outputs(some, steps)) for some in images.split(500)]
        outputs[name] = {step: torch.cat([part[step] for part in parts]) for step in steps}
    return Split(images, labels, outputs)


def rows_of(study: Study, seed: int) -> Tensor:
    """Return the rows of the training images of a seed."""
    order = torch.randperm(len(study.splits["train"].labels), generator=torch.Generator().manual_seed(seed))
    return order[: study.train_images]


# Linear probes


def last_token(outputs: Mapping[int, Tensor]) -> Tensor:
    return functional.layer_norm(outputs[max(outputs) - 1][:, 0], outputs[0].shape[-1:])


def gathered_mean(outputs: Mapping[int, Tensor]) -> Tensor:
    maps = [output[:, 1:] for step, output in outputs.items() if step < max(outputs)]
    return functional.layer_norm(torch.stack(maps).sum(0), outputs[0].shape[-1:]).mean(1)


def patch_mean(outputs: Mapping[int, Tensor]) -> Tensor:
    return functional.layer_norm(outputs[max(outputs) - 1][:, 1:].mean(1), outputs[0].shape[-1:])


def pooled(outputs: Mapping[int, Tensor]) -> Tensor:
    return outputs[max(outputs)]


PROBES: dict[str, tuple[str, Callable[[Mapping[int, Tensor]], Tensor]]] = {
    "class token": (VIT, last_token),
    "mean of the patches, gathered (MIST without its edge)": (VIT, gathered_mean),
    "mean of the patches": (VIT, patch_mean),
    "pooled": (RESNET, pooled),
}
READOUTS = {VIT: ("class token", "mean of the patches"), RESNET: ("pooled",)}
"""The readouts that the linear probe chooses from."""


def probe(title: str, seed: int) -> Accuracies:
    """Fit a logistic regression on standardised features, with the weight decay that validation images choose."""
    study = _study[0]
    name, features_of = PROBES[title]
    rows = rows_of(study, seed)
    features = {split: features_of(data.outputs[name]) for split, data in study.splits.items()}
    middle, spread = features["train"][rows].mean(0), features["train"][rows].std(0) + 1e-6
    features = {split: (values - middle) / spread for split, values in features.items()}
    found = []
    for decay in DECAYS:
        layer = regression(features["train"][rows], study.splits["train"].labels[rows], decay)
        logits = {split: layer(features[split]) for split in ("validation", "test")}
        found.append({split: percent(logits[split], study.splits[split].labels) for split in logits})
    return max(found, key=lambda accuracies: accuracies["validation"])


def regression(features: Tensor, labels: Tensor, decay: float) -> nn.Linear:
    layer = nn.Linear(features.shape[1], CLASSES)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(
        layer.parameters(), max_iter=1000, tolerance_grad=1e-5, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(layer(features), labels) + decay * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer.requires_grad_(False)


# Variants


def run_variants(pool: ProcessPoolExecutor, study: Study) -> list[dict[str, Any]]:
    """Run a method's first variant with every rate and one seed, then every variant and seed with the best rate."""
    variants = [(name, variant) for name, group in VARIANTS.items() for variant in group]
    first: dict[str, dict[float, Future[Accuracies]]] = {}
    for name, variant in variants:
        if variant.method not in first:
            rates = RATES[variant.method.partition("_")[0]]
            first[variant.method] = {rate: pool.submit(run, name, variant, rate, SEEDS[0]) for rate in rates}
    best: dict[str, float] = {}
    for method, futures in first.items():
        found = {rate: future.result() for rate, future in futures.items()}
        best[method] = max(found, key=lambda rate: found[rate]["validation"])
        print(f"{method}: rate {best[method]} of {found}", flush=True)
    runs = [
        [pool.submit(run, name, variant, best[variant.method], seed) for seed in SEEDS] for name, variant in variants
    ]
    rows = []
    for (name, variant), of_seeds in zip(variants, runs, strict=True):
        model = patches.attach(study.backbones[name], variant.method, CLASSES, **variant.options)
        rows.append(
            {
                "method": variant.method,
                "variant": variant.title,
                "trained": model.parameter_counts().trained,
                "rate": best[variant.method],
                **summary([future.result() for future in of_seeds]),
            }
        )
        print(rows[-1], flush=True)
    return rows


_study: list[Study] = []
"""The study of this process, if it runs variants."""


def set_up(study: Study | None = None) -> None:
    torch.set_num_threads(1)
    if study is not None:
        _study.append(study)


def run(name: str, variant: Variant, rate: float, seed: int) -> Accuracies:
    """Train a variant from the frozen outputs, and test it."""
    study = _study[0]
    model = patches.attach(study.backbones[name], variant.method, CLASSES, seed=seed, **variant.options)

    def logits(split: str, rows: Tensor) -> Tensor:
        data = study.splits[split]
        outputs = {step: data.outputs[name][step][rows] for step in model.reads}
        return model.own_part(data.images[rows], model.condense(outputs))

    chosen = rows_of(study, seed)
    model.train()
    fit(
        lambda rows: logits("train", chosen[rows]),
        study.splits["train"].labels[chosen],
        [tensor for tensor in model.private_state().values() if tensor.requires_grad],
        epochs=study.epochs[name],
        rate=rate,
        seed=seed,
    )
    model.eval()
    found = {}
    for split in ("validation", "test"):
        labels = study.splits[split].labels
        with torch.no_grad():
            parts = [logits(split, rows) for rows in torch.arange(len(labels)).split(500)]
        found[split] = percent(torch.cat(parts), labels)
    return found


def fit(
    logits: Callable[[Tensor], Tensor],
    labels: Tensor,
    parameters: list[Tensor],
    *,
    epochs: int,
    rate: float,
    seed: int,
) -> None:
    """Train by AdamW with a cosine, of which a tenth is warm-up, in whole epochs."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.01)
    steps = epochs * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for rows in order[: steps // epochs * BATCH].split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(logits(rows), labels[rows]).backward()
            optimizer.step()
            schedule.step()


def percent(logits: Tensor, labels: Tensor) -> float:
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def summary(seeds: list[Accuracies]) -> dict[str, float]:
    test = [accuracies["test"] for accuracies in seeds]
    return {
        "validation": mean(accuracies["validation"] for accuracies in seeds),
        "test": mean(test),
        "std over seeds": stdev(test),
    }


def make_goals(rows: list[dict[str, Any]], probes: Mapping[str, Mapping[str, float]]) -> list[Goal]:
    goals = []
    for name, variants in VARIANTS.items():
        best = max(READOUTS[name], key=lambda title: probes[title]["validation"])
        for method in dict.fromkeys(variant.method for variant in variants if variant.method in RATES):
            row = next(row for row in rows if row["method"] == method)
            lead = row["test"] - probes[best]["test"]
            goals.append(at_least(f"{method} ({row['variant']}): points above the linear probe", lead, POINTS))
    parasite, zeroed = (
        next(row["test"] for row in rows if (row["method"], row["variant"]) == ("parasite", title))
        for title in (f"ratio {BEST_RATIO}", "zeroed host")
    )
    goals.append(at_least("parasite: points above the same with a zeroed host", parasite - zeroed, 0.0))
    return goals


if __name__ == "__main__":
    main()
