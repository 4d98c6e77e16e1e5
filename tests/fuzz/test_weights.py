"""Weights files that were damaged, and weights files that hold something else than a state dict of tensors."""

import io
import struct
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from random import Random
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import patches
from tests.fuzz.damage import damaged, rewritten, value
from tests.fuzz.harness import fuzz
from tests.patches.helpers import SMALL, small_backbone

State = dict[Any, Any]
ENDINGS = {"zip": "pth", "old": "pt", "safetensors": "safetensors"}


class Reduced:
    """Unpickles as the result of a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def content(kind: str, state: State) -> bytes:
    """Return the bytes of a weights file."""
    if kind == "safetensors":
        return safetensors.torch.save(state)
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


def odd_tensor(random: Random, tensor: Tensor) -> Any:
    """Return another value for an entry of a state dict."""
    odd = (
        lambda: tensor.clone().float().fill_(float(random.choice(("nan", "inf", "-inf", "1")))),
        lambda: tensor.to(random.choice((torch.float64, torch.float16, torch.int8, torch.bool, torch.complex64))),
        lambda: tensor.float().to(torch.float8_e4m3fn),
        lambda: tensor.reshape(-1)[:1],
        lambda: tensor.unsqueeze(0),
        lambda: torch.zeros(1).expand(10**9, 10**9),
        lambda: tensor.to_sparse() if tensor.dim() else tensor,
        lambda: tensor.to("meta"),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)]),
        lambda: torch.nn.Parameter(tensor.float()),
        lambda: torch.nn.parameter.UninitializedParameter(),
        lambda: tensor.numpy(),
        lambda: Counter("text"),
        lambda: torch.Size([3]),
        lambda: torch.float32,
        lambda: Reduced(bytearray, 10**9),
        lambda: Reduced(print, "run"),
        lambda: Reduced(torch.zeros, 10**9),
        lambda: value(random),
    )
    return random.choice(odd)()


def changed_state(random: Random, whole: State) -> bytes:
    """Return a file of torch with a changed state dict."""
    state: State = OrderedDict(whole)
    for _ in range(random.choice((1, 1, 2, 50))):
        name = random.choice(list(state) or [""])
        kind = random.choice(("value", "value", "value", "key", "drop", "nest"))
        if kind == "value":
            state[name] = odd_tensor(random, whole.get(name, torch.ones(2)))
        elif kind == "key":
            state[random.choice((7, None, 0.5, (1, 2), "", "x" * 5_000, "\ud800", str(name).upper()))] = torch.ones(2)
        elif kind == "drop":
            state.pop(name, None)
        else:
            state[name] = {"state_dict": state.get(name)}
    other: Any = random.choice((state, state, state, state, list(state.items()), {"model": state}, None, 3, "text"))
    return content(random.choice(("zip", "old")), other)


def repickled(random: Random, whole: bytes) -> bytes:
    """Return a zip file of torch with a damaged pickle, whose checksum fits."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w") as new:
        for member in old.infolist():
            data = old.read(member)
            compressed = zipfile.ZIP_DEFLATED if random.random() < 0.02 else zipfile.ZIP_STORED
            changed = damaged(random, data) if member.filename.endswith("data.pkl") else data
            new.writestr(member.filename, changed, compressed)
    return buffer.getvalue()


def relaid(random: Random, whole: bytes) -> bytes:
    """Return a safetensors file with another header."""
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    text = rewritten(random, whole[8:end])
    return struct.pack("<Q", len(text)) + text + whole[end:]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_weights_are_whole_or_refused(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in small_backbone().network.state_dict().items()}
    whole = {kind: content(kind, state) for kind in ENDINGS}
    hash_of_whole = small_backbone().content_hash()
    kinds: list[str] = []

    def make(random: Random) -> bytes:
        kind = random.choice((*ENDINGS, *ENDINGS, "rewritten", "rewritten", "repickled", "relaid"))
        kinds[:] = [kind]
        if kind in ENDINGS:
            data = damaged(random, whole[kind])
        elif kind == "rewritten":
            data = changed_state(random, state)
        else:
            data = repickled(random, whole["zip"]) if kind == "repickled" else relaid(random, whole["safetensors"])
        path().write_bytes(data)
        return data

    def path() -> Path:
        return tmp_path / f"weights.{ENDINGS.get(kinds[0], 'safetensors' if kinds[0] == 'relaid' else 'pth')}"

    def read(_: bytes) -> None:
        backbone = patches.load_backbone("mobilenet_v2", path(), num_classes=5, **SMALL)
        for name, tensor in backbone.network.state_dict().items():
            assert tensor.shape == state[name].shape
            assert tensor.isfinite().all()
        if kinds[0] == "zip":  # the one kind that has checksums
            assert backbone.content_hash() == hash_of_whole, "a changed byte was not found"

    fuzz("weights", 60, (patches.BackboneError,), make, read)
