"""A parameter group: tensors that the same set of tasks shares, their optimiser and their running statistics."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from multitask.server.layout import Layout, Role
from multitask.server.messages import AVERAGE, GroupValues


class ParameterGroup:
    """The values of one group, or of one shard's range of it, in one flat buffer that only `apply` changes.

    Each shard of the server holds one for every group on the server. A worker holds one for the private tensors of its
    task, if the task has no other worker. Under engine `local`, one process holds all of them.
    """

    def __init__(
        self,
        layout: Layout,
        state: GroupValues,
        make_optimizer: Callable[[Tensor, Tensor], Optimizer],
        rate_factor: float = 1.0,
        part: tuple[int, int] | None = None,
        ema: float | None = None,
    ) -> None:
        """Args:
        state: the whole group at the start, with the optimiser's slots if the optimiser has made steps; copied.
        make_optimizer: takes the trained values with and without weight decay, and returns their optimiser.
        rate_factor: multiplies the rate of every step.
        part: start and stop of this shard's range in the pushed floats; all of them by default.
        ema: decay of an exponential moving average of the trained values, which begins with the values at the start.
        """
        start, stop = part or (0, layout.pushed)
        self.values = torch.tensor(state.values[start:stop])
        self.counters = torch.tensor(state.counters)
        self.updates = 0
        """Number of times that `apply` has changed the values."""
        self._rate_factor = rate_factor
        self._sections = [
            slice(min(max(begin - start, 0), stop - start), min(max(end - start, 0), stop - start))
            for begin, end in zip((0, *layout.ends[:2]), layout.ends[:3], strict=True)
        ]
        momenta = torch.zeros(layout.pushed)
        for slot in layout.slots:
            if slot.role is Role.STATISTIC:
                momenta[slot.offset : slot.offset + slot.size] = slot.momentum
        self._momenta = momenta[start:stop][self._sections[Role.STATISTIC]].clone()
        self._live_counters = sum(slot.role is Role.COUNTER for slot in layout.slots)
        self._trained = [self.values[self._sections[role]] for role in (Role.DECAYED, Role.PLAIN)]
        self._optimizer = make_optimizer(*self._trained)
        trained = slice(min(start, layout.trained), min(stop, layout.trained))
        slots = {name: slot[trained] for name, slot in state.slots.items()}
        average = slots.pop(AVERAGE, self.values.numpy()[: trained.stop - trained.start])
        self._ema = ema
        self._average = None if ema is None else torch.tensor(average)
        if state.scalars or slots:
            self._load(slots, state.scalars)

    @property
    def size(self) -> int:
        """Number of floats that a push carries for this group, or for this range of it."""
        return self.values.numel()

    @torch.no_grad()
    def apply(self, push: Tensor, rate: float) -> None:
        """Make one optimiser step on the trained values and one momentum step on the running statistics.

        The average of the trained values becomes ema * average + (1 - ema) * values. Running statistics are averages
        already.

        Args:
            push: shape (size,), float32: gradients, then the batch's mean and (unbiased) variance of each
                normalisation layer.
            rate: learning rate by the server's schedule.
        """
        for values, section in zip(self._trained, self._sections, strict=False):
            values.grad = push[section]
        for group in self._optimizer.param_groups:
            group["lr"] = rate * self._rate_factor
        self._optimizer.step()
        self.updates += 1
        for values in self._trained:
            values.grad = None
        if self._average is not None and self._ema is not None:
            self._average.lerp_(self.values[: self._average.numel()], 1 - self._ema)
        statistics = self._sections[Role.STATISTIC]
        self.values[statistics].lerp_(push[statistics], self._momenta)
        self.counters[: self._live_counters] += 1

    def view(self) -> GroupValues:
        """Return the present values without a copy; the next `apply` changes them."""
        return GroupValues(self.values.numpy(), self.counters.numpy())

    def state(self, slots: bool = False) -> GroupValues:
        """Return a copy of the present values and their average, with or without the optimiser's slots."""
        values, counters = self.values.numpy().copy(), self.counters.numpy().copy()
        averages = {} if self._average is None else {AVERAGE: self._average.numpy().copy()}
        if not slots:
            return GroupValues(values, counters, averages)
        decayed, plain = (self._optimizer.state[values] for values in self._trained)
        names = [name for name, slot in decayed.items() if slot is not None]
        return GroupValues(
            values,
            counters,
            averages | {name: torch.cat([decayed[name], plain[name]]).numpy() for name in names if decayed[name].dim()},
            {name: float(decayed[name]) for name in names if not decayed[name].dim()},
        )

    def _load(self, slots: Mapping[str, np.ndarray], scalars: Mapping[str, float]) -> None:
        """Give the optimiser the slots and single numbers of an earlier state."""
        cut = self._trained[0].numel()
        parts = ({n: slot[:cut] for n, slot in slots.items()}, {n: slot[cut:] for n, slot in slots.items()})
        state = {
            index: {name: torch.tensor(slot) for name, slot in part.items()}
            | {name: torch.tensor(value, dtype=torch.float32) for name, value in scalars.items()}
            for index, part in enumerate(parts)
        }
        self._optimizer.load_state_dict({"state": state, "param_groups": self._optimizer.state_dict()["param_groups"]})
