"""Read weights from a file or from torchvision, and load them into a network that they fit."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from patches.errors import BackboneError
from patches.names import unknown_name_message
from patches.structure import dtype_name

FILE_TYPES = (".safetensors", ".pth", ".pt")
"""Endings of the weights files that can be read. Other names are torchvision's names of weights."""
COUNTER = "num_batches_tracked"
"""BatchNorm's count of batches. Checkpoints of torch before 0.4.1 have none."""


def load_weights(
    network: nn.Module, name: str, weights: str | os.PathLike[str], heads: tuple[str, ...], auxiliary: str | None
) -> None:
    """Copy weights into `network`. Names, shapes and dtypes are checked before a value is written.

    The network takes the floating dtype of a weights file first, if the file has only one.

    Args:
        name: the backbone's name in torchvision.
        weights: a file (.safetensors, .pth, .pt), which must fit exactly, or the name of torchvision weights. From
            these, a head of another size and an auxiliary branch that the network does not have are left out.
        heads: paths of the network's heads.
        auxiliary: path of the family's auxiliary branch, or None if the family has none.
    Raises:
        BackboneError: the weights do not exist, cannot be read or do not fit.
    """
    if str(weights).endswith(FILE_TYPES):
        state = _read_file(Path(weights))
        source = f"Weights file '{weights}'"
        dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
        if len(dtypes) == 1:
            network.to(dtypes.pop())
    else:
        state = _from_torchvision(name, str(weights))
        source = f"Weights '{weights}'"
        own = network.state_dict()
        left_out = []
        if auxiliary is not None and getattr(network, auxiliary) is None:
            left_out.append(auxiliary)
        if any(own[f"{head}.bias"].shape != state[f"{head}.bias"].shape for head in heads):
            left_out += heads
        state = {key: value for key, value in state.items() if not key.startswith(tuple(f"{p}." for p in left_out))}
        state |= {key: value for key, value in own.items() if key.startswith(tuple(f"{head}." for head in left_out))}
    _check_fit(network.state_dict(), state, source, name)
    network.load_state_dict(state)


def _from_torchvision(name: str, weights: str) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights

    known = get_model_weights(name).__members__
    if weights not in known:
        message = unknown_name_message(f"weights of backbone '{name}'", weights, known)
        raise BackboneError(f"{message} A file must end in {', '.join(FILE_TYPES)}.")
    try:
        return dict(known[weights].get_state_dict(progress=False, check_hash=True, weights_only=True))
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise BackboneError(
            f"Weights '{weights}' of backbone '{name}' could not be fetched: {error}. "
            "Fetch them on a machine with a network and give the file's path instead."
        ) from error


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BackboneError(f"Weights file '{path}' does not exist. Check the path.") from error
    except (OSError, safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise BackboneError(
            f"Weights file '{path}' cannot be read: {error}. It must be a whole safetensors file, or a state dict "
            "saved with torch.save that holds tensors only."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BackboneError(
            f"Weights file '{path}' holds a {type(state).__name__}, not a state dict of tensors. "
            "Save model.state_dict() itself."
        )
    return dict(state)


def _check_fit(own: Mapping[str, Tensor], state: dict[str, Tensor], source: str, name: str) -> None:
    """Check that a state dict fits the network's own one, and add the counters that an old checkpoint does not have.

    Raises:
        BackboneError: it does not fit. The message names the first missing, unexpected and mis-shaped tensor.
    """
    if not any(key.endswith(COUNTER) for key in state):
        state |= {key: value for key, value in own.items() if key.endswith(COUNTER)}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    differing = [
        f"'{key}' (expected {list(tensor.shape)} {dtype_name(tensor)}, "
        f"found {list(state[key].shape)} {dtype_name(state[key])})"
        for key, tensor in own.items()
        if key in state and (state[key].shape != tensor.shape or state[key].dtype != tensor.dtype)
    ]
    found = [
        f"{kind}, {len(names)} in all, first {names[0]}"
        for kind, names in (
            ("missing", [f"'{key}'" for key in missing]),
            ("unexpected", [f"'{key}'" for key in unexpected]),
            ("mis-shaped", differing),
        )
        if names
    ]
    if found:
        raise BackboneError(
            f"{source} does not fit backbone '{name}': {'; '.join(found)}. "
            "Build the backbone with the num_classes and options that the weights were made with."
        )
