"""What the values of a version say about the pushes that made it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from multitask.job.checkpoint import Checkpoint
from multitask.server.messages import Evaluation
from tests.simulation import formulas
from tests.simulation.toy import ToyJob

Steps = frozenset[int]


@dataclass(frozen=True)
class View:
    """The tensors of one version, by name: `backbone/NAME` and `tasks/TASK/NAME`."""

    what: str
    """For messages: which version it is, and where it comes from."""
    job: ToyJob
    tensors: Mapping[str, Tensor]
    server: int | None = None
    """Incarnation of the server that evaluated the version; None for a checkpoint."""

    @cached_property
    def rows(self) -> dict[str, int]:
        """Worker -> its row in the tensors `counts`."""
        options = {task.name: task.options for task in self.job.spec.tasks}
        return {name: options[task]["row"] + int(name.rpartition("/")[2]) for name, task in self.job.workers.items()}

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """Shared part -> its tensor `counts`: shape (rows, steps)."""
        names = [name for name in self.tensors if name.startswith("backbone/") and name.endswith(".counts")]
        return {name.split("/")[1].removesuffix(".counts"): self.tensors[name].numpy() for name in names}

    def parts_of(self, task: str) -> list[str]:
        """Return the shared parts that a task uses."""
        shares: list[str] = self.job.task(task).options["shares"]
        return shares

    @cached_property
    def applied(self) -> dict[str, Steps]:
        """Worker -> the steps whose push is in the values of every shared part that the worker uses."""
        found = {}
        for name, task in self.job.workers.items():
            parts = [set(np.flatnonzero(self.counts[part][self.rows[name]])) for part in self.parts_of(task)]
            found[name] = frozenset(int(step) for step in set.intersection(*parts))
        return found

    def private(self, task: str, name: str) -> np.ndarray:
        """Return a private tensor of a task."""
        return self.tensors[f"tasks/{task}/patch.{name}"].numpy()

    def learned(self, worker: str) -> Steps:
        """Return the steps from which the private tensors of a task's worker have learned."""
        task, _, rank = worker.rpartition("/")
        return frozenset(int(step) for step in np.flatnonzero(self.private(task, "learned")[int(rank)]))


def view_of_evaluation(job: ToyJob, evaluation: Evaluation) -> View:
    """Return the view of an evaluated version."""
    backbone, private = job.state(evaluation.groups)
    tensors = {f"backbone/{name}": tensor for name, tensor in backbone.items()}
    for task, own in private.items():
        tensors |= {f"tasks/{task}/{name}": tensor for name, tensor in own.items()}
    return View(f"evaluation of version {evaluation.version}", job, tensors, evaluation.server)


def view_of_checkpoint(job: ToyJob, checkpoint: Checkpoint) -> View:
    """Return the view of a checkpoint's version."""
    values = {
        name.removeprefix("values/"): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith("values/")
    }
    return View(f"checkpoint of version {checkpoint.progress.version}", job, values)


def expected_private(job: ToyJob, task: str, made: list[int]) -> formulas.PrivateTensors:
    """Return the private tensors of a task with one worker after steps that were not rejected."""
    spec = job.spec
    rate = spec.optimizer.rate * spec.private_rate_factor
    momentum: float = getattr(spec.optimizer, "momentum", 0.0)
    return formulas.private_after(task, formulas.steps_of_one(made, rate), spec.steps, momentum)
