"""Read weights from a file or from torchvision, and load them into a network that they fit."""

import io
import os
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from patches.errors import BackboneError
from patches.names import unknown_name_message
from patches.quoting import quoted, shortened
from patches.structure import dtype_name, not_finite
from patches.tensor_layout import read_layout
from patches.zips import is_zip, open_stored, read_member

FILE_TYPES = (".safetensors", ".pth", ".pt")
"""Endings of the weights files that can be read. Other names are torchvision's names of weights."""
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
"""The floating dtypes that a backbone can have."""
COUNTER = "num_batches_tracked"
"""BatchNorm's count of batches. Checkpoints of torch before 0.4.1 have none."""
OLD_PICKLES = 5
"""Number of pickles with which a file of torch before 1.6 begins."""
OF_TORCHSCRIPT = "constants.pkl"
"""End of the name of a member that is in every file of `torch.jit.save`, and in no other."""
OF_TENSORS = ("torch.", "collections.OrderedDict")
"""Beginnings of the names of what a state dict's pickle asks for."""
_GLOBAL = re.compile(r"GLOBAL (\S+)")
"""Where torch's error names a class or function that a pickle asks for."""
_ADVICE = "weights_only"
"""The option that torch's errors advise to switch off, which would run what is in a file."""


def is_weights_file(weights: str | os.PathLike[str]) -> bool:
    """Return whether the name ends as a file of weights does. Any other name is one of torchvision's weights."""
    return str(weights).endswith(FILE_TYPES)


def build_from_file(build: Callable[[], nn.Module], name: str, path: Path) -> nn.Module:
    """Build a network with the weights of a file, which must fit exactly.

    The network takes the floating dtype of the file, if the file has only one. It is built without values first, on
    torch's meta device, so that no memory is taken unless the file has every tensor of the network.

    Args:
        build: returns the network with any values, the same one in each call.
        name: the backbone's name in torchvision.
        path: a .safetensors, .pth or .pt file.
    Raises:
        BackboneError: the file does not exist, cannot be read, does not fit, or holds NaN or infinity.
    """
    state = _read_file(path)
    source = f"Weights file '{path}'"
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= FLOATS else None
    with torch.device("meta"):
        outline = build().to(dtype)
    _check_fit(outline.state_dict(), state, source, name)
    _check_finite(state, source)
    network = build().to(dtype)
    network.load_state_dict(state)
    return network


def load_from_torchvision(
    network: nn.Module, name: str, weights: str, heads: tuple[str, ...], auxiliary: str | None
) -> None:
    """Copy torchvision's weights into `network`. Names, shapes and dtypes are checked before a value is written.

    A head of another size and an auxiliary branch that the network does not have are left out.

    Args:
        name: the backbone's name in torchvision.
        weights: the name of the weights.
        heads: paths of the network's heads.
        auxiliary: path of the family's auxiliary branch, or None if the family has none.
    Raises:
        BackboneError: the weights do not exist, cannot be fetched, do not fit, or hold NaN or infinity.
    """
    state = _from_torchvision(name, weights)
    source = f"Weights '{weights}'"
    own = network.state_dict()
    left_out = []
    if auxiliary is not None and getattr(network, auxiliary) is None:
        left_out.append(auxiliary)
    if any(own[f"{head}.bias"].shape != state[f"{head}.bias"].shape for head in heads):
        left_out += heads
    state = {key: value for key, value in state.items() if not key.startswith(tuple(f"{p}." for p in left_out))}
    state |= {key: value for key, value in own.items() if key.startswith(tuple(f"{head}." for head in left_out))}
    _check_fit(own, state, source, name)
    _check_finite(state, source)
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
            f"Weights '{weights}' of backbone '{name}' could not be fetched: {_reason(error)}. "
            "Fetch them on a machine with a network and give the file's path instead."
        ) from error


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise BackboneError(f"Weights file '{path}' does not exist. Check the path.")
    try:
        if not path.is_file():
            raise OSError("it is no file")
        if path.suffix == ".safetensors":
            read_layout(path)
            return safetensors.torch.load_file(path)
        _check_pickles(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises what its parts raise: a dozen kinds for damaged files
        raise BackboneError(
            f"Weights file '{path}' cannot be read: {_reason(error)}. It must be a whole safetensors file, or a state "
            "dict saved with torch.save that holds tensors only, and no TorchScript model."
        ) from error
    if not isinstance(state, Mapping):
        raise BackboneError(
            f"Weights file '{path}' holds a {type(state).__name__}, not a state dict of tensors. "
            "Save model.state_dict() itself."
        )
    for key, value in state.items():
        if not isinstance(key, str) or not _is_plain(value):
            raise BackboneError(
                f"Weights file '{path}' holds a {type(value).__name__} under {quoted(key)}, not a state dict of "
                "tensors: names with dense tensors. Save model.state_dict() itself."
            )
    return dict(state)


def _check_pickles(path: Path) -> None:
    """Check that a file of `torch.save` is undamaged and makes nothing but tensors.

    torch itself does not look at the checksums in the file. It also lets through a few other classes, such as
    `bytearray`, of which a short file can make gigabytes, and compressed files, whose size says nothing about the
    memory that they take. Files of torch before 1.6 have no checksums.

    Raises:
        ValueError: the file is compressed or damaged, its pickles name a class or function of another kind, or it holds
            the code of a TorchScript model.
    """
    if is_zip(path):
        with open_stored(path) as package:
            if any(name.endswith(OF_TORCHSCRIPT) for name in package.namelist()):
                raise ValueError(_foreign("a TorchScript model"))
            for name in package.namelist():
                data = read_member(package, name)
                if name.endswith("data.pkl"):
                    _check_pickle(io.BytesIO(data))
    else:
        with path.open("rb") as file:
            for _ in range(OLD_PICKLES):
                _check_pickle(file)


def _check_pickle(stream: BinaryIO) -> None:
    for opcode, argument, _ in pickletools.genops(stream):
        name = str(argument).replace(" ", ".")
        if opcode.name == "GLOBAL" and not name.startswith(OF_TENSORS):
            raise ValueError(_foreign(name))


def _foreign(name: str) -> str:
    return f"it holds {shortened(name)}, and only tensors are unpickled, because other objects can run code"


def _is_plain(value: object) -> bool:
    """Return whether a value is a tensor as a state dict has them, whose values lie in memory one after the other."""
    return (
        isinstance(value, Tensor)
        and not isinstance(value, UninitializedBuffer | UninitializedParameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_nested)
    )


def _reason(error: Exception) -> str:
    """Return what is wrong with a file, without torch's own advice, which is to unpickle the file."""
    said = str(error).partition("\n")[0] or repr(error)
    if not isinstance(error, pickle.UnpicklingError) and _ADVICE not in said:
        return shortened(said)
    foreign = _GLOBAL.search(str(error))
    if foreign is None or _ADVICE in foreign[1]:
        return "it is damaged, or torch.save did not write it"
    return _foreign(foreign[1])


def _check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raises:
    BackboneError: a tensor holds NaN or infinity.
    """
    name = not_finite(state)
    if name is not None:
        raise BackboneError(
            f"{source}: tensor '{shortened(name)}' holds NaN or infinity, and a model with such values answers "
            "nonsense. Use an earlier checkpoint, or train the weights again."
        )


def _check_fit(own: Mapping[str, Tensor], state: dict[str, Tensor], source: str, name: str) -> None:
    """Check that a state dict fits the network's own one, and add the counters that an old checkpoint does not have.

    Raises:
        BackboneError: it does not fit. The message names the first missing, unexpected and mis-shaped tensor.
    """
    if not any(key.endswith(COUNTER) for key in state):
        state |= {key: torch.zeros_like(value, device="cpu") for key, value in own.items() if key.endswith(COUNTER)}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    differing = [
        f"'{key}' (expected {list(tensor.shape)} {dtype_name(tensor)}, "
        f"found {quoted(list(state[key].shape))} {dtype_name(state[key])})"
        for key, tensor in own.items()
        if key in state and (state[key].shape != tensor.shape or state[key].dtype != tensor.dtype)
    ]
    found = [
        f"{kind}, {len(names)} in all, first {names[0]}"
        for kind, names in (
            ("missing", [f"'{key}'" for key in missing]),
            ("unexpected", [f"'{shortened(key)}'" for key in unexpected]),
            ("mis-shaped", differing),
        )
        if names
    ]
    if found:
        raise BackboneError(
            f"{source} does not fit backbone '{name}': {'; '.join(found)}. "
            "Build the backbone with the num_classes and options that the weights were made with."
        )
