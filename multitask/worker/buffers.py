"""The flat buffers of a worker's model."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from multitask.server.layout import Layout, Role, bind, training_norms
from multitask.server.messages import as_tensor
from multitask.worker.server import Values


class ModelBuffers:
    """Values, counters and gradients of a network, one flat buffer per group; the network's tensors are views of them.

    A normalisation layer that learns its running statistics gets momentum 1, so that a forward pass leaves the batch's
    own mean and variance in the value buffer. These statistics travel with the gradients. The process that keeps the
    group applies the layer's real momentum to them.
    """

    def __init__(
        self,
        network: nn.Module,
        layouts: Mapping[str, Layout],
        initial: Mapping[str, tuple[Tensor, Tensor]],
        device: torch.device,
    ) -> None:
        """Move the network's tensors into new buffers.

        Args:
            layouts: group -> its layout, for all groups that the network holds.
            initial: group -> values (layout.size,) and counters (layout.counters,) at the start; copied.
            device: holds the buffers.
        """
        self._layouts = dict(layouts)
        self.values: Mapping[str, Tensor] = {group: initial[group][0].to(device, copy=True) for group in layouts}
        """Group -> values: shape (layout.size,)."""
        self.counters: Mapping[str, Tensor] = {group: initial[group][1].to(device, copy=True) for group in layouts}
        """Group -> counters: shape (layout.counters,)."""
        self.gradients: Mapping[str, Tensor] = {
            group: torch.zeros(layout.pushed, device=device) for group, layout in layouts.items()
        }
        """Group -> gradients, then batch statistics: shape (layout.pushed,). All buffers stay the same ones."""
        for group, layout in layouts.items():
            bind(network, layout, self.values[group], self.counters[group], self.gradients[group])
        for norm in training_norms(network).values():
            norm.momentum = 1.0

    def zero_gradients(self) -> None:
        for gradient in self.gradients.values():
            gradient.zero_()

    def add_batch_statistics(self, share: float) -> None:
        """Add a share of the statistics of the latest batch to those beside the gradients.

        The forward pass left them in the value buffer, where the next forward pass overwrites them.
        """
        for group, layout in self._layouts.items():
            statistics = layout.section(self.values[group], Role.STATISTIC)
            layout.section(self.gradients[group], Role.STATISTIC).add_(statistics, alpha=share)

    def load(self, values: Values) -> None:
        """Overwrite the part of each given group that training changes."""
        for name, parts in values.items():
            start = 0
            for part in parts:
                self.values[name][start : start + part.values.size].copy_(as_tensor(part.values))
                start += part.values.size
            self.counters[name].copy_(as_tensor(parts[0].counters))

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the values and counters of this moment after the block."""
        kept = {group: (self.values[group].clone(), self.counters[group].clone()) for group in self._layouts}
        yield
        for group, (values, counters) in kept.items():
            self.values[group].copy_(values)
            self.counters[group].copy_(counters)
