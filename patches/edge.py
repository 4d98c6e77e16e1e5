"""MIST at the edge: train a task from gathered maps alone, in little memory and without a backbone.

    python -m patches.edge train.arrow --validation validation.arrow --out pets.patch

`multitask gather` makes the maps, on a machine that has the backbone. The bundle attaches to that backbone.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from patches.bundle import save_bundle
from patches.errors import FeatureError
from patches.features import FeatureFile
from patches.methods.mist import Edge
from patches.quoting import quoted

MAPS = "maps"
"""Name of the maps' feature in the files."""
CHUNK = 8
"""Number of images whose activations are in memory at the same time."""


def make_edge(maps: FeatureFile, *, seed: int = 0, **options: Any) -> Edge:
    """Make a fresh edge network for the maps of a file.

    Args:
        maps: a file that `multitask gather` wrote.
        seed: seed of the side network and the head.
        options: options of `Mist` except `k`, which the file determines.
    Raises:
        FeatureError: the file holds something else than gathered maps.
        PatchError: the backbone is not a ViT, or an option is wrong.
    """
    if set(maps.layouts) != {MAPS}:
        raise FeatureError(f"'{maps.path}' holds no gathered maps. Name a file that `multitask gather` wrote.")
    return Edge(maps.about["backbone"], len(maps.about["classes"]), seed=seed, k=maps.about["k"], **options)


def train_edge(
    edge: Edge, maps: FeatureFile, *, epochs: int, rate: float, batch_size: int = 32, chunk: int = CHUNK, seed: int = 0
) -> list[float]:
    """Train an edge network in place, with Adam and a learning rate that falls to 0 on a cosine.

    A step is one update with the mean gradient of `batch_size` images. The network has no layer that mixes the images
    of a batch. Therefore the gradient is summed over chunks of the batch, and only the activations of one chunk are in
    memory.

    Args:
        edge: the network to train.
        maps: the images' gathered maps and labels.
        epochs: number of passes over the images. Each one has its own random order.
        rate: learning rate at the start.
        batch_size: number of images in a step. Images at the end of an epoch that do not fill a batch are left out.
        chunk: number of images in one forward and backward pass.
        seed: seed of the random orders.
    Returns:
        The mean loss of each step.
    Raises:
        FeatureError: there are fewer images than one batch takes.
    Source: Tang, Fu and Wu, "Minimal Interaction Separated Tuning", CVPR 2025, arXiv:2406.17559: Adam, batches of 32
        and the cosine.
    """
    steps_per_epoch = len(maps) // batch_size
    if not steps_per_epoch:
        raise FeatureError(
            f"'{maps.path}' has {len(maps)} images, and a batch takes {batch_size}. Use a smaller batch size."
        )
    generator = torch.Generator().manual_seed(seed)
    optimizer = Adam(edge.parameters(), rate)
    schedule = CosineAnnealingLR(optimizer, T_max=epochs * steps_per_epoch)
    losses = []
    for _ in range(epochs):
        order = torch.randperm(len(maps), generator=generator)
        for number in range(steps_per_epoch):
            batch = order[number * batch_size : (number + 1) * batch_size]
            loss = 0.0
            for x, labels in _chunks(maps, batch, chunk):
                part = functional.cross_entropy(edge(x), labels, reduction="sum") / batch_size
                part.backward()
                loss += part.item()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss)
    return losses


@torch.no_grad()
def predict(edge: Edge, maps: FeatureFile, chunk: int = CHUNK) -> Tensor:
    """Return the logits of all images in the order of the file, shape (images, num_classes)."""
    return torch.cat([edge(x) for x, _ in _chunks(maps, torch.arange(len(maps)), chunk)])


def labels_in(maps: FeatureFile, classes: Sequence[str]) -> Tensor:
    """Return the labels of a file as positions in another class list, shape (images,). Classes are matched by name.

    Raises:
        FeatureError: the file has a class that is not in the list.
    """
    place = {name: number for number, name in enumerate(classes)}
    names = maps.about["classes"]
    unknown = [name for name in names if name not in place]
    if unknown:
        raise FeatureError(
            f"'{maps.path}': found class {quoted(unknown[0])} ({len(unknown)} such of {len(names)}), which is not "
            f"among the {len(classes)} classes of the training maps. Gather both files from tables with the same "
            "classes."
        )
    return torch.tensor([place[name] for name in names])[torch.from_numpy(maps.labels)]


def _chunks(maps: FeatureFile, places: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the maps (n, 1 + patches, d) and labels (n,) of the images at `places`, up to `chunk` images at a time."""
    for part in places.split(chunk):
        x = maps.layouts[MAPS].empty(len(part))
        maps.read(MAPS, part.numpy(), x, range(len(part)))
        yield x, torch.from_numpy(maps.labels[part.numpy()])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a task of method 'mist' from gathered maps alone.")
    parser.add_argument("maps", type=Path, help="training maps that `multitask gather` wrote")
    parser.add_argument("--validation", type=Path, metavar="FILE", help="maps to measure the accuracy on")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the bundle")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    maps = FeatureFile(arguments.maps)
    if arguments.validation is not None:
        validation = FeatureFile(arguments.validation)
        labels = labels_in(validation, maps.about["classes"])
    edge = make_edge(maps, seed=arguments.seed, layers=arguments.layers, rank=arguments.rank)
    losses = train_edge(
        edge,
        maps,
        epochs=arguments.epochs,
        rate=arguments.rate,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    metrics = {"train_loss": losses[-1]}
    if arguments.validation is not None:
        right = predict(edge, validation).argmax(1) == labels
        metrics["validation_top1"] = 100 * right.double().mean().item()
    save_bundle(
        edge,
        arguments.out,
        classes=maps.about["classes"],
        preprocessing=maps.about["preprocessing"],
        metrics=metrics,
    )
    print(f"Written to {arguments.out}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))


if __name__ == "__main__":
    main()
