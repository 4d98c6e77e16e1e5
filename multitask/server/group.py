"""A parameter group: the tensors that the same tasks share, their optimiser and the running statistics."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from multitask.server.layout import Layout, Role
from multitask.server.messages import GroupValues


class ParameterGroup:
    """Values of one group in one flat buffer, changed by `apply` alone.

    The server holds one per set of tasks that share tensors; a worker holds one for the private tensors of a task
    that has no other worker; engine `local` holds the same objects in one process.
    """

    def __init__(
        self,
        layout: Layout,
        values: Tensor,
        counters: Tensor,
        make_optimizer: Callable[[Tensor, Tensor], Optimizer],
        rate_factor: float = 1.0,
    ) -> None:
        """Args:
        values: shape (layout.size,), float32; taken over, not copied.
        counters: shape (layout.counters,), int64; taken over.
        make_optimizer: from the trained values with and without weight decay to their optimiser.
        rate_factor: multiplies the rate of every step.
        """
        self.layout = layout
        self.values = values
        self.counters = counters
        self._trained = tuple(layout.section(values, role).detach() for role in (Role.DECAYED, Role.PLAIN))
        self._optimizer = make_optimizer(*self._trained)
        self._rate_factor = rate_factor
        statistics = [slot for slot in layout.slots if slot.role is Role.STATISTIC]
        self._statistics = layout.section(values, Role.STATISTIC)
        self._momenta = torch.zeros_like(self._statistics)
        start = layout.ends[Role.PLAIN]
        for slot in statistics:
            self._momenta[slot.offset - start : slot.offset - start + slot.size] = slot.momentum
        self._live_counters = sum(slot.role is Role.COUNTER for slot in layout.slots)

    @torch.no_grad()
    def apply(self, push: Tensor, rate: float) -> None:
        """One optimiser step on the trained values, one momentum step on the running statistics.

        Args:
            push: shape (layout.pushed,), float32: gradients, then the batch's mean and (unbiased) variance of each
                normalisation layer.
            rate: learning rate, as the server's schedule has it.
        """
        for values, role in zip(self._trained, (Role.DECAYED, Role.PLAIN), strict=True):
            values.grad = self.layout.section(push, role)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * self._rate_factor
        self._optimizer.step()
        for values in self._trained:
            values.grad = None
        self._statistics.lerp_(self.layout.section(push, Role.STATISTIC), self._momenta)
        self.counters[: self._live_counters] += 1

    def state(self) -> GroupValues:
        """A copy of what training changes."""
        return GroupValues(self.values[: self.layout.pushed].numpy().copy(), self.counters.numpy().copy())

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's slots and step counts, as torch's `state_dict` gives them."""
        return self._optimizer.state_dict()
