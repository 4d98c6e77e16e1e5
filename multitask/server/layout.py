"""Layouts: the place of every tensor of a group in the group's flat buffer."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import torch
from torch import Tensor, nn

ALIGNMENT_FLOATS = 16
"""Views start at multiples of 64 bytes. On unaligned memory, kernels take other code paths, which changes bits."""


class Role(IntEnum):
    """What training does with a tensor. The roles stand in the order of the sections of the flat buffer."""

    DECAYED = 0
    """A tensor of two or more dimensions that is trained with weight decay."""
    PLAIN = 1
    """A tensor that is trained without weight decay: a bias, or the scale or shift of a normalisation layer."""
    STATISTIC = 2
    """A running mean or variance that forward passes in train mode update."""
    FIXED = 3
    """A float tensor that training does not change."""
    COUNTER = 4
    """A normalisation layer's batch counter that training counts up (int64, kept beside the flat buffer)."""
    FIXED_COUNTER = 5
    """A batch counter that training does not change (int64, kept beside the flat buffer)."""


FLOATS = (Role.DECAYED, Role.PLAIN, Role.STATISTIC, Role.FIXED)


@dataclass(frozen=True)
class Slot:
    """The place of one tensor. `offset` and `size` count floats in the flat buffer, or entries in the counters."""

    name: str
    role: Role
    shape: tuple[int, ...]
    offset: int
    parameter: bool
    """True for a parameter of the network, False for a buffer."""
    momentum: float = 0.0
    """Momentum of a running statistic: running = (1 - momentum) * running + momentum * batch."""

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()

    def view(self, buffer: Tensor) -> Tensor:
        """Return the tensor as a view of the flat buffer or of the counters."""
        return buffer[self.offset : self.offset + self.size].view(self.shape)


@dataclass(frozen=True)
class Layout:
    """The slots of one group. Pushed tensors (trained ones, then statistics) lie before the fixed ones."""

    slots: tuple[Slot, ...]
    ends: tuple[int, int, int, int]
    """Ends of the sections DECAYED, PLAIN, STATISTIC and FIXED of the flat buffer, in floats."""

    @property
    def size(self) -> int:
        """Number of floats in the flat buffer, padding included."""
        return self.ends[Role.FIXED]

    @property
    def trained(self) -> int:
        """Number of floats that the optimiser changes; they come first in a push."""
        return self.ends[Role.PLAIN]

    @property
    def pushed(self) -> int:
        """Number of floats that a push and a pull carry: the part of the buffer that training changes."""
        return self.ends[Role.STATISTIC]

    @property
    def counters(self) -> int:
        """Number of counters, which lie beside the flat buffer."""
        return sum(slot.role >= Role.COUNTER for slot in self.slots)

    @property
    def parameters(self) -> int:
        """Number of parameters, trained or not, without padding, running statistics and counters."""
        return sum(slot.size for slot in self.slots if slot.parameter)

    def section(self, buffer: Tensor, role: Role) -> Tensor:
        """Return the part of a flat buffer that holds all tensors of a role."""
        start = self.ends[role - 1] if role else 0
        return buffer[start : self.ends[role]]

    def trained_slots(self) -> list[Slot]:
        """Return the slots of the tensors that the optimiser changes."""
        return [slot for slot in self.slots if slot.role <= Role.PLAIN]

    def ranges(self, shards: int) -> list[tuple[int, int]]:
        """Cut the pushed floats into contiguous ranges of about equal size, one for each shard, on aligned borders."""
        blocks = self.pushed // ALIGNMENT_FLOATS
        borders = [ALIGNMENT_FLOATS * -(-blocks * shard // shards) for shard in range(shards + 1)]
        return list(pairwise(borders))

    def tensors(self, values: Tensor, counters: Tensor) -> dict[str, Tensor]:
        """Return name -> view of a flat buffer of shape (size,), or of counters of shape (counters,)."""
        return {slot.name: slot.view(counters if slot.role >= Role.COUNTER else values) for slot in self.slots}


def make_layout(tensors: Mapping[str, Tensor], roles: Mapping[str, Role], momenta: Mapping[str, float]) -> Layout:
    """Lay tensors out in one flat float32 buffer, section after section.

    Args:
        tensors: name -> float32 tensor, or int64 scalar for a counter.
        roles: name -> what training does with the tensor.
        momenta: name of a running statistic -> the momentum of its layer.
    Raises:
        ValueError: a tensor is neither float32 nor a counter.
    """
    for name, tensor in tensors.items():
        wanted = torch.int64 if roles[name] >= Role.COUNTER else torch.float32
        if tensor.dtype != wanted:
            raise ValueError(
                f"Tensor '{name}' has dtype {tensor.dtype}, but the trainer keeps {wanted} here. "
                "Convert the backbone with .float() before it is attached."
            )
    slots: list[Slot] = []
    ends: list[int] = []
    offset = 0
    for role in FLOATS:
        for name in (name for name in tensors if roles[name] is role):
            tensor = tensors[name]
            parameter = isinstance(tensor, nn.Parameter)
            slots.append(Slot(name, role, tuple(tensor.shape), offset, parameter, momenta.get(name, 0.0)))
            offset += -(-slots[-1].size // ALIGNMENT_FLOATS) * ALIGNMENT_FLOATS
        ends.append(offset)
    counters = sorted((name for name in tensors if roles[name] >= Role.COUNTER), key=lambda name: roles[name])
    slots += [Slot(name, roles[name], (), index, parameter=False) for index, name in enumerate(counters)]
    return Layout(tuple(slots), (ends[0], ends[1], ends[2], ends[3]))


def named_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return name -> the network's own Parameter or buffer, for all names of its state dict.

    The state dict itself would give detached tensors in place of the parameters.
    """
    live = dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers(remove_duplicate=False))
    return {name: live[name] for name in network.state_dict()}


def training_norms(network: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Return module path -> normalisation layer, for the layers in train mode that keep running statistics."""
    return {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats
    }


def tensor_roles(network: nn.Module) -> tuple[dict[str, Role], dict[str, float]]:
    """Return the role of every tensor of a network in train mode, and the momentum of each running statistic.

    Raises:
        ValueError: a normalisation layer has momentum None. It asks for a cumulative average, which a server that
            applies pushes one by one cannot keep.
    """
    roles: dict[str, Role] = {}
    momenta: dict[str, float] = {}
    norms = training_norms(network)
    for name, tensor in named_tensors(network).items():
        path, _, leaf = name.rpartition(".")
        if leaf == "num_batches_tracked":
            roles[name] = Role.COUNTER if path in norms else Role.FIXED_COUNTER
        elif leaf in ("running_mean", "running_var") and path in norms:
            momentum = norms[path].momentum
            if momentum is None:
                raise ValueError(f"Normalisation layer '{path}' has momentum None; set a number, for example 0.1.")
            roles[name] = Role.STATISTIC
            momenta[name] = momentum
        elif tensor.requires_grad:
            roles[name] = Role.DECAYED if tensor.dim() > 1 else Role.PLAIN
        else:
            roles[name] = Role.FIXED
    return roles, momenta


def bind(network: nn.Module, layout: Layout, values: Tensor, counters: Tensor, gradients: Tensor) -> None:
    """Make the network's tensors views of flat buffers, so that one copy moves a whole group.

    Args:
        network: its tensors that the layout names become views; the memory that they used before is left behind.
        values: shape (layout.size,), float32.
        counters: shape (layout.counters,), int64.
        gradients: shape (layout.pushed,), float32; trained parameters accumulate their gradients here.
    """
    live = named_tensors(network)
    for name, view in layout.tensors(values, counters).items():
        live[name].data = view
    for slot in layout.slots:
        if slot.role in (Role.DECAYED, Role.PLAIN):
            live[slot.name].grad = slot.view(gradients)


def flatten(tensors: Mapping[str, Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
    """Copy tensors into a new flat buffer, shape (layout.size,), and new counters, shape (layout.counters,)."""
    values = torch.zeros(layout.size)
    counters = torch.zeros(layout.counters, dtype=torch.int64)
    for name, view in layout.tensors(values, counters).items():
        view.copy_(tensors[name].detach())
    return values, counters
