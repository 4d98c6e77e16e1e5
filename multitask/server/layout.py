"""Where every tensor of a group lies in the group's flat buffer."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import torch
from torch import Tensor, nn

ALIGNMENT_FLOATS = 16
"""Views start at multiples of 64 bytes: kernels take other code paths on unaligned memory, which changes bits."""


class Role(IntEnum):
    """What training does with a tensor; in the order of the sections of the flat buffer."""

    DECAYED = 0
    """Trained, with weight decay: tensors of two or more dimensions."""
    PLAIN = 1
    """Trained, without weight decay: biases, scales and shifts of normalisation layers."""
    STATISTIC = 2
    """A running mean or variance that training forward passes update."""
    FIXED = 3
    """A float tensor that training leaves alone."""
    COUNTER = 4
    """A normalisation layer's batch counter that training counts up (int64, beside the flat buffer)."""
    FIXED_COUNTER = 5


FLOATS = (Role.DECAYED, Role.PLAIN, Role.STATISTIC, Role.FIXED)


@dataclass(frozen=True)
class Slot:
    """One tensor's place. `offset` and `size` count floats in the flat buffer, or entries in the counters."""

    name: str
    role: Role
    shape: tuple[int, ...]
    offset: int
    parameter: bool
    """A parameter of the network, not a buffer."""
    momentum: float = 0.0
    """Of a running statistic: running = (1 - momentum) * running + momentum * batch."""

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()

    def view(self, buffer: Tensor) -> Tensor:
        return buffer[self.offset : self.offset + self.size].view(self.shape)


@dataclass(frozen=True)
class Layout:
    """The slots of one group: what is pushed (trained tensors, then statistics) comes before what is fixed."""

    slots: tuple[Slot, ...]
    ends: tuple[int, int, int, int]
    """Where the sections DECAYED, PLAIN, STATISTIC and FIXED of the flat buffer end, in floats."""

    @property
    def size(self) -> int:
        """Floats in the flat buffer, padding included."""
        return self.ends[Role.FIXED]

    @property
    def trained(self) -> int:
        """Floats that the optimiser moves: the first part of what is pushed."""
        return self.ends[Role.PLAIN]

    @property
    def pushed(self) -> int:
        """Floats that a push and a pull carry: the buffer's part that training changes."""
        return self.ends[Role.STATISTIC]

    @property
    def counters(self) -> int:
        return sum(slot.role >= Role.COUNTER for slot in self.slots)

    @property
    def parameters(self) -> int:
        """Parameters, trained or not; padding, running statistics and counters are not counted."""
        return sum(slot.size for slot in self.slots if slot.parameter)

    def section(self, buffer: Tensor, role: Role) -> Tensor:
        start = self.ends[role - 1] if role else 0
        return buffer[start : self.ends[role]]

    def trained_slots(self) -> list[Slot]:
        """The tensors that the optimiser moves."""
        return [slot for slot in self.slots if slot.role <= Role.PLAIN]

    def ranges(self, shards: int) -> list[tuple[int, int]]:
        """Cut what is pushed into contiguous ranges of about equal size, one for each shard, on aligned borders."""
        blocks = self.pushed // ALIGNMENT_FLOATS
        borders = [ALIGNMENT_FLOATS * -(-blocks * shard // shards) for shard in range(shards + 1)]
        return list(pairwise(borders))

    def tensors(self, values: Tensor, counters: Tensor) -> dict[str, Tensor]:
        """Name -> view, over a flat buffer of shape (size,) and counters of shape (counters,)."""
        return {slot.name: slot.view(counters if slot.role >= Role.COUNTER else values) for slot in self.slots}


def make_layout(tensors: Mapping[str, Tensor], roles: Mapping[str, Role], momenta: Mapping[str, float]) -> Layout:
    """Lay tensors out in one flat float32 buffer, section after section.

    Args:
        tensors: name -> float32 tensor, or int64 scalar for a counter.
        roles: name -> what training does with it.
        momenta: name of a running statistic -> its layer's momentum.
    Raises:
        ValueError: a tensor that is neither float32 nor a counter.
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
    """Name -> the live Parameter or buffer of a network's state dict (whose own values are detached copies)."""
    live = dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers(remove_duplicate=False))
    return {name: live[name] for name in network.state_dict()}


def training_norms(network: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Module path -> the normalisation layers whose running statistics change while the network is in train mode."""
    return {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats
    }


def tensor_roles(network: nn.Module) -> tuple[dict[str, Role], dict[str, float]]:
    """What training does with every tensor of a network in train mode, and the momentum of each running statistic.

    Raises:
        ValueError: a normalisation layer with momentum None (a cumulative average has no place on a server that
            applies pushes one by one).
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
        network: its tensors named in the layout are re-pointed; what they held is no longer used.
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
