"""Measure a model: its accuracy on held-out images, and the running statistics of its normalisation layers."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from multitask.data import Batch
from multitask.server.layout import training_norms


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use this many threads inside the block.

    Results are equal bit for bit only with equal numbers of threads, and processes that compute side by side slow each
    other down if each of them uses all cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device | None = None,
    keep: Callable[[Batch, Tensor], None] | None = None,
) -> dict[str, float]:
    """Return top-1 and top-5 accuracy (percent) and the mean cross-entropy over batches; leave the model in eval mode.

    Args:
        model: images (B, 3, R, R) -> logits (B, C).
        batches: read once; every label must be below C.
        device: holds the model; None for the CPU.
        keep: called with each batch and its logits.
    """
    model.eval()
    images = top1 = top5 = 0
    loss = 0.0
    for batch in batches:
        logits = model(batch.images(device).contiguous(memory_format=torch.channels_last))
        if keep is not None:
            keep(batch, logits)
        labels = batch.labels.to(device)
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        images += len(labels)
        top1 += int(ranked[:, 0].sum())
        top5 += int(ranked.sum())
        loss += functional.cross_entropy(logits, labels, reduction="sum").item()
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "loss": loss / images}


@torch.no_grad()
def reestimate_statistics(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Replace running means and variances by their plain average over batches; no parameter changes.

    Only layers whose statistics change in train mode are measured. The patch method `norm_statistics` makes the
    statistics private to the task, so that measuring them leaves other tasks alone.
    Source: Mudrakarta et al., "K for the Price of 1", ICLR 2019, Table 6, middle row.
    """
    norms = list(training_norms(model.train()).values())
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # With None, torch computes the cumulative average.
        norm.training = True
    for batch in batches:
        model(batch.images().contiguous(memory_format=torch.channels_last))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
