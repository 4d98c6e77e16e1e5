"""Training without this project's engines: a plain loop, torch's DistributedDataParallel, and the parameter server of
Ray's documentation. All of them train torchvision's network on the batches that this project's workers read.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torchvision.models import get_model

from benchmarks._turns import TIMEOUT_S, Mark
from multitask.cluster.memory import keep_freed_memory
from multitask.data import Batch
from multitask.job.assignment import rank_of
from multitask.job.job import Job
from multitask.spec.optimizers import SGDSpec


def make_network(job: Job) -> nn.Module:
    """Return a network on the CPU with the same values in every process, which keeps freed memory as a worker does."""
    keep_freed_memory()
    backbone = job.spec.backbone
    torch.manual_seed(job.spec.seed)
    return get_model(backbone.name, num_classes=backbone.num_classes).train()


def device_of(job: Job) -> torch.device:
    return torch.device("cuda" if job.spec.resources.gpus_per_worker else "cpu")


def make_optimizer(job: Job, network: nn.Module) -> SGD:
    """Return the optimiser that the project's groups have."""
    assert isinstance(job.spec.optimizer, SGDSpec)
    return SGD(network.parameters(), job.spec.optimizer.rate, job.spec.optimizer.momentum, fused=True)


def backward(network: nn.Module, batch: Batch, device: torch.device) -> None:
    """Make a forward and a backward pass as TaskWorker.compute does, with the wait for the loss."""
    images = batch.images(device).contiguous(memory_format=torch.channels_last)
    loss = functional.cross_entropy(network(images), batch.labels.to(device))
    loss.backward()
    loss.item()


def start_workers(kind: type, job: Job, *arguments: Any) -> list[Any]:
    """Start an actor for each worker of a job."""
    actor: Any = ray.remote(kind).options(num_cpus=0, num_gpus=job.spec.resources.gpus_per_worker)
    shared_job = ray.put(job)
    return [actor.remote(shared_job, name, *arguments) for name in job.workers]


class PlainWorker:
    """The shortest training loop: updates in place and shares nothing."""

    def __init__(self, job: Job, name: str) -> None:
        torch.set_num_threads(job.spec.resources.threads_per_worker)
        self._device = device_of(job)
        self._network = make_network(job).to(self._device)
        self._optimizer = make_optimizer(job, self._network)
        self._batches: Iterator[Batch] = job.make_batches(name)

    def train(self, steps: int) -> list[Mark]:
        marks = []
        for _ in range(steps):
            self._optimizer.zero_grad()
            backward(self._network, next(self._batches), self._device)
            self._optimizer.step()
            marks.append(Mark(time.perf_counter()))
        return marks


class DDPWorker(PlainWorker):
    """One rank of DistributedDataParallel."""

    def __init__(self, job: Job, name: str, backend: str, store: Path) -> None:
        """Args:
        store: a file that does not exist yet, through which the ranks find each other.
        """
        super().__init__(job, name)
        distributed.init_process_group(backend, f"file://{store}", rank=rank_of(name), world_size=len(job.workers))
        # Its defaults, but for a copy of each gradient that this one saves.
        self._network = DistributedDataParallel(self._network, gradient_as_bucket_view=True)


class Plain:
    """Two plain loops that share nothing."""

    def __init__(self, job: Job) -> None:
        self.actors = start_workers(PlainWorker, job)

    def turn(self, steps: int) -> list[list[Mark]]:
        return ray.get([actor.train.remote(steps) for actor in self.actors], timeout=TIMEOUT_S)


class DDP(Plain):
    """DistributedDataParallel, with its ranks as actors on one node."""

    def __init__(self, job: Job, backend: str, store: Path) -> None:
        store.unlink(missing_ok=True)
        self.actors = start_workers(DDPWorker, job, backend, store)


class DocumentedServer:
    """The ParameterServer of Ray's documentation: a whole network, updated tensor by tensor.

    Source: "Parameter Server" among the examples of Ray Core,
        https://docs.ray.io/en/latest/ray-core/examples/plot_parameter_server.html; the optimiser has a momentum here.
    """

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.spec.resources.threads_per_worker)
        self._network = make_network(job)
        self._optimizer = make_optimizer(job, self._network)

    def apply_gradients(self, *gradients: list[np.ndarray]) -> dict[str, Tensor]:
        """Add the workers' gradients, update, and return the new weights."""
        summed = [np.stack(parts).sum(axis=0) for parts in zip(*gradients, strict=True)]
        self._optimizer.zero_grad()
        for parameter, gradient in zip(self._network.parameters(), summed, strict=True):
            parameter.grad = torch.from_numpy(gradient)
        self._optimizer.step()
        return self.get_weights()

    def get_weights(self) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in self._network.state_dict().items()}


class DocumentedWorker:
    """The DataWorker of Ray's documentation, with a clock."""

    def __init__(self, job: Job, name: str) -> None:
        torch.set_num_threads(job.spec.resources.threads_per_worker)
        self._device = device_of(job)
        self._network = make_network(job).to(self._device)
        self._batches: Iterator[Batch] = job.make_batches(name)
        self._marks: list[Mark] = []
        self._blocked = 0.0
        self._left = time.perf_counter()

    def compute_gradients(self, weights: dict[str, Tensor]) -> list[np.ndarray]:
        # Between two calls the worker waits: for the server, the driver and the transport.
        self._blocked += time.perf_counter() - self._left
        self._network.load_state_dict(weights)
        self._network.zero_grad()
        backward(self._network, next(self._batches), self._device)
        found = (parameter.grad for parameter in self._network.parameters())
        gradients = [gradient.cpu().numpy() for gradient in found if gradient is not None]
        self._left = time.perf_counter()
        self._marks.append(Mark(self._left, self._blocked))
        return gradients

    def take_marks(self) -> list[Mark]:
        """Return the marks since the last call."""
        taken, self._marks = self._marks, []
        return taken


class Documented:
    """The training loops of Ray's documentation around its parameter server, without evaluations.

    Source: as DocumentedServer.
    """

    def __init__(self, job: Job, *, synchronous: bool) -> None:
        self._train = self._synchronous if synchronous else self._asynchronous
        server: Any = ray.remote(DocumentedServer).options(num_cpus=0)
        self._server = server.remote(job)
        self._workers = start_workers(DocumentedWorker, job)
        self.actors: list[Any] = [self._server, *self._workers]

    def turn(self, steps: int) -> list[list[Mark]]:
        self._train(steps)
        return ray.get([worker.take_marks.remote() for worker in self._workers], timeout=TIMEOUT_S)

    def _synchronous(self, steps: int) -> None:
        weights = self._server.get_weights.remote()
        for _ in range(steps):
            gradients = [worker.compute_gradients.remote(weights) for worker in self._workers]
            weights = self._server.apply_gradients.remote(*gradients)
        ray.get(weights, timeout=TIMEOUT_S)

    def _asynchronous(self, steps: int) -> None:
        weights = self._server.get_weights.remote()
        gradients = {worker.compute_gradients.remote(weights): worker for worker in self._workers}
        # The last gradient of each worker is computed and, as in the documentation, not applied.
        for _ in range((steps - 1) * len(self._workers)):
            ready, _ = ray.wait(list(gradients), timeout=TIMEOUT_S)
            worker = gradients.pop(ready[0])
            weights = self._server.apply_gradients.remote(ready[0])
            gradients[worker.compute_gradients.remote(weights)] = worker
        ray.get(list(gradients), timeout=TIMEOUT_S)
