"""What a toy job trains in place of networks on images: networks without a forward pass, and a stream of numbers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multitask.cluster.interface import Clock
from multitask.data import Batch
from multitask.data.stream import Drawn
from multitask.server.layout import Layout
from multitask.server.messages import GroupValues
from multitask.spec.schema import TaskSpec
from multitask.worker import StepResult, Values
from multitask.worker.buffers import ModelBuffers
from tests.simulation import formulas
from tests.simulation.behaviour import FIRST_PROCESS, Behaviour, StepFault

PATCH = "patch"
"""Name of the module with a task's private tensors."""
ANSWERS = 4
"""Values of a shared group whose gradients depend on all values that the worker holds."""


class SharedPart(nn.Module):
    """Tensors that several tasks share."""

    def __init__(self, rows: int, steps: int) -> None:
        super().__init__()
        self.counts = nn.Parameter(torch.zeros(rows, steps))
        """Row of the worker, batch -> how often this push was applied, times the rate."""
        self.answers = nn.Parameter(torch.zeros(ANSWERS))
        self.norm = nn.BatchNorm1d(formulas.STATISTICS, affine=False, momentum=formulas.NORM_MOMENTUM)
        self.register_buffer("fixed", torch.arange(3.0))


class PrivatePart(nn.Module):
    """The private tensors of one task."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.zeros(formulas.RANKS, steps))
        self.total = nn.Parameter(torch.zeros(1))
        self.norm = nn.BatchNorm1d(formulas.STATISTICS, affine=False, momentum=formulas.NORM_MOMENTUM)


class ToyModel:
    """A task's model: what `plan_groups` asks of a `PatchedModel`."""

    def __init__(self, task: TaskSpec, rows: int, steps: int, train_shared: bool) -> None:
        """Args:
        rows: rows of the tensors `counts`.
        """
        self.network = nn.Module()
        for name in task.options["shares"]:
            part = SharedPart(rows, steps)
            if not train_shared:
                part.requires_grad_(False).eval()
            self.network.add_module(name, part)
        self.shared_names = list(self.network.state_dict())
        if task.options["private"]:
            self.network.add_module(PATCH, PrivatePart(steps))
        self.private_names = [name for name in self.network.state_dict() if name not in self.shared_names]


class ToyStream:
    """The training stream of a worker, as `SharedStream` reads it: its batches hold nothing but their numbers."""

    def __init__(self, task: TaskSpec, start: int) -> None:
        self.position = start
        self._rows, self._skips = task.batch_size, task.undecodable == "skip"

    def draw(self, resolutions: Sequence[int]) -> Drawn:  # noqa: ARG002
        number = formulas.batch_at(self.position, self._rows, self._skips)
        after = formulas.batch_start(number + 1, self._rows, self._skips)
        skipped = after - self.position - self._rows
        bad = (f"row {after - 1}",) if skipped else ()
        self.position = after
        labels = np.full(self._rows, number)
        return Drawn({}, labels, labels, skipped, bad, after)


class HookedTensor:
    """A tensor of the toy's network whose hooks the learner calls itself, as a backward pass would."""

    def __init__(self) -> None:
        self.hooks: list[Callable[[Any], None]] = []

    def register_post_accumulate_grad_hook(self, hook: Callable[[Any], None]) -> None:
        self.hooks.append(hook)


@dataclass(frozen=True)
class ToyPlace:
    """Which worker a learner belongs to."""

    worker: str
    task: TaskSpec
    rank: int
    process: int
    """Number of learners that this worker has had before in the run."""

    @property
    def row(self) -> int:
        """Row of the worker in the tensors `counts`."""
        return self.task.options["row"] + self.rank


class ToyLearner:
    """Computes the gradients of a worker's steps (`multitask.worker.Learner`) in virtual time."""

    def __init__(
        self,
        place: ToyPlace,
        model: ToyModel,
        layouts: Mapping[str, Layout],
        initial: Mapping[str, tuple[Tensor, Tensor]],
        batches: Iterator[Batch],
        behaviour: Behaviour,
        clock: Clock,
    ) -> None:
        self._place, self._network, self._batches = place, model.network, batches
        self._behaviour, self._clock = behaviour, clock
        self._private_names = model.private_names
        self._buffers = ModelBuffers(model.network, layouts, initial, torch.device("cpu"))
        changed = sorted(name for name, layout in layouts.items() if layout.pushed)
        values, counters = self._buffers.values, self._buffers.counters
        self._trained = [values[name][: layouts[name].trained].numpy() for name in changed]
        self._changed = [(values[name][: layouts[name].pushed].numpy(), counters[name].numpy()) for name in changed]
        self._parts = [
            GradientWriter(name, part) for name, part in model.network.named_children() if part.norm.training
        ]
        self._hooked = {name: HookedTensor() for name, _ in model.network.named_parameters()}
        self._evaluations = 0

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        return self._buffers.gradients

    @property
    def evaluates(self) -> bool:
        return self._place.rank == 0

    def load(self, values: Values) -> None:
        self._buffers.load(values)

    def compute(self, step: int, before_last_backward: Callable[[], None]) -> StepResult:
        place, clock, start = self._place, self._clock, self._clock.monotonic()
        batch = next(self._batches)
        skips = place.task.undecodable == "skip"
        number = formulas.batch_at(batch.position, place.task.batch_size, skips) - 1
        fault = self._behaviour.fault(place.worker, step)
        seconds = self._behaviour.step_s(place.worker, step, place.process) + fault.seconds
        if fault.kind == "hang" and place.process == FIRST_PROCESS:
            seconds = self._behaviour.hang_s
        clock.sleep(seconds / 2)
        if fault.kind == "raise":
            raise ToyError(f"batch {number} cannot be learned from")
        held = formulas.hash_of(self._trained)
        before_last_backward()
        self._buffers.zero_gradients()
        for part in reversed(self._parts):
            part.write(place, number, held, fault)
            for hook in (hook for name in reversed(part.names) for hook in self._hooked[name].hooks):
                hook(None)
            clock.sleep(seconds / 2 / len(self._parts))
        self._buffers.add_batch_statistics(1.0)
        return StepResult(
            loss=formulas.loss_of(place.worker, number),
            images=len(batch.labels),
            seconds=clock.monotonic() - start,
            position=batch.position,
            skipped=batch.skipped,
            bad_images=batch.bad_images,
            problem=None,
        )

    def evaluate(
        self, values: Values, private: Mapping[str, GroupValues], alive: Callable[[], None]
    ) -> dict[str, float]:
        seconds = self._behaviour.evaluation_s(self._place.worker, self._evaluations, self._place.process)
        self._evaluations += 1
        with self._buffers.restored():
            self._buffers.load(values)
            self._buffers.load({name: [group] for name, group in private.items()})
            for _ in range(2):
                self._clock.sleep(seconds / 2)
                alive()
            return formulas.metrics_of_bytes(self._changed)

    def keep_features(self) -> None:
        """A toy job has no feature cache."""

    def tensors(self) -> Mapping[str, Any]:
        return self._hooked

    def private_state(self) -> dict[str, Tensor]:
        state = self._network.state_dict()
        return {name: state[name] for name in self._private_names}


class GradientWriter:
    """Writes the gradients and the batch statistics of one part of a toy's network, whose tensors are bound."""

    def __init__(self, name: str, part: nn.Module) -> None:
        self.names = [f"{name}.{own}" for own, _ in part.named_parameters()]
        self._private = name == PATCH
        self._gradients = [parameter.grad.numpy() for parameter in part.parameters()]
        norm = part.norm
        self._mean, self._variance = norm.running_mean.numpy(), norm.running_var.numpy()
        self._batches_seen = norm.num_batches_tracked.numpy()

    def write(self, place: ToyPlace, batch: int, held: int, fault: StepFault) -> None:
        """Write what a batch teaches, and let the normalisation layer find the batch's statistics.

        Args:
            held: a hash of the values that the worker holds.
        """
        first, second = self._gradients
        if self._private:
            first[place.rank, batch] = second[0] = -formulas.amount(place.task.name, batch)
        else:
            first[place.row, batch] = -1.0
            second[:] = [(held >> 2 * number & 3) - 1 for number in range(ANSWERS)]
        if fault.kind == ("nan-private" if self._private else "nan-shared"):
            second[0] = np.nan
        name = place.task.name if self._private else place.worker
        self._mean[:], self._variance[:] = formulas.batch_statistics(name, batch)
        self._batches_seen += 1


class ToyError(RuntimeError):
    """What a worker raises in a step where `Behaviour` says so."""
