"""Bundles that were damaged, and bundles that somebody wrote on purpose, with the hash that fits them."""

import dataclasses
import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import patches
from patches.sealed import UNSEALED, seal
from tests.fuzz.damage import as_text, damaged, edit, value
from tests.fuzz.harness import fuzz
from tests.patches.helpers import randomise_side, small_backbone, small_transformer

DTYPES = {"F32": torch.float32, "I64": torch.int64}
METHODS: dict[str, dict[str, Any]] = {
    "scale_bias": {"statistics": "source"},
    "scale_bias+last_layer": {},
    "norm_statistics+last_layer": {},
    "shared": {},
    "parasite": {"ratio": 0.5},
    "mist": {"rank": 4, "layers": 2},
    "dtl_plus": {},
}


@dataclasses.dataclass(frozen=True)
class Bundle:
    backbone: patches.Backbone
    data: bytes

    @property
    def end(self) -> int:
        """Where the header ends."""
        return 8 + struct.unpack("<Q", self.data[:8])[0]

    def header(self) -> dict[str, Any]:
        header: dict[str, Any] = json.loads(self.data[8 : self.end])
        return header


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    path = tmp_path_factory.mktemp("bundles") / "task.patch"
    networks = {
        name: small_transformer("small_vit") if name in ("mist", "dtl_plus") else small_backbone() for name in METHODS
    }
    found = []
    for method, options in METHODS.items():
        model = randomise_side(patches.attach(networks[method], method, 3, **options))
        patches.save_bundle(model, path, classes=["a", "b", "c"], preprocessing={"resolution": 16, "mean": [0.5] * 3})
        found.append(Bundle(networks[method], path.read_bytes()))
    return found


def rewritten(random: Random, bundle: Bundle) -> bytes:
    """Return the bundle with another manifest, header or values, and with the hash that fits them."""
    header, payload = bundle.header(), bundle.data[bundle.end :]
    manifest = json.loads(header["__metadata__"]["manifest"]) | {"payload_sha256": UNSEALED}
    kind = random.choice(("manifest", "manifest", "options", "options", "layout", "layout", "both", "values"))
    if kind == "manifest":
        edit(random, manifest)
    elif kind == "options":
        options = random.choice((manifest["options"], manifest["options"], manifest["backbone"]["options"]))
        key = random.choice([*options, "rank"])
        options[key] = value(random, options.get(key))
    elif kind == "both":  # a tensor that neither the header nor the manifest has any more
        name = random.choice(list(manifest["tensors"]) or [""])
        header.pop(name, None)
        manifest["tensors"].pop(name, None)
    elif kind == "values":
        payload = damaged(random, payload)[: len(payload)].ljust(len(payload), b"\0") if payload else payload
    header["__metadata__"]["manifest"] = as_text(manifest, random)
    if kind == "layout":
        _edit_layout(random, header)
    text = as_text(header, random).encode("utf-8", "surrogatepass")
    if random.random() < 0.1:
        text = damaged(random, text)
    try:
        return seal(struct.pack("<Q", len(text)) + text + payload)[0]
    except ValueError:  # there is no hash any more
        return struct.pack("<Q", len(text)) + text + payload


def _edit_layout(random: Random, header: dict[str, Any]) -> None:
    names = [name for name in header if name != "__metadata__"]
    if not names or random.random() < 0.3:
        edit(random, header)
        return
    one, other = random.choice(names), random.choice(names)
    entry = header[one]
    kind = random.choice(("shift", "swap", "same", "shape", "dtype", "edit"))
    if kind == "shift":
        by = random.choice((-8, -4, 4, 8, 10**6))
        entry["data_offsets"] = [place + by for place in entry["data_offsets"]]
    elif kind == "swap":
        entry["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], entry["data_offsets"]
    elif kind == "same":
        entry["data_offsets"] = header[other]["data_offsets"]
    elif kind == "shape":
        entry["shape"] = random.choice(([*entry["shape"], 1], [], [0], [2**32, 2**32], entry["shape"][::-1]))
    elif kind == "dtype":
        entry["dtype"] = random.choice(("F64", "F16", "BF16", "I32", "U8", "F8_E4M3", "C64", "x"))
    else:
        edit(random, entry)


def check(data: bytes, model: patches.PatchedModel, info: patches.BundleInfo) -> None:
    """Fail unless an accepted bundle is whole, and the model and the manifest are what it says."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    manifest = json.loads(header.pop("__metadata__")["manifest"])
    text = json.dumps(dataclasses.asdict(info), sort_keys=True, allow_nan=False, ensure_ascii=False)
    assert text.encode() == json.dumps(manifest, sort_keys=True, allow_nan=False, ensure_ascii=False).encode()
    assert info.num_classes == len(info.classes) == model.num_classes
    assert (info.method, info.head) == (model.method, model.head)
    assert json.dumps(info.fixed_head, sort_keys=True) == json.dumps(model.fixed_head, sort_keys=True)
    assert json.dumps({**model.options, **info.options}) == json.dumps(model.options)
    covered = sorted(entry["data_offsets"] for entry in header.values())
    assert [0, *(stop for _, stop in covered)] == [*(start for start, _ in covered), len(data) - end]
    state = model.private_state()
    assert state.keys() == header.keys() == info.tensors.keys()
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        tensor = state[name].detach()
        assert (list(tensor.shape), tensor.dtype) == (entry["shape"], DTYPES[entry["dtype"]])
        assert tensor.contiguous().numpy().tobytes() == data[end + start : end + stop]
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("on_purpose", [False, True], ids=["damaged", "rewritten"])
def test_a_bundle_is_whole_or_refused(bundles: list[Bundle], tmp_path: Path, on_purpose: bool) -> None:
    path = tmp_path / "task.patch"
    hashes = {bundle.backbone: bundle.backbone.content_hash() for bundle in bundles}
    current: list[Bundle] = []

    def make(random: Random) -> bytes:
        current[:] = [random.choice(bundles)]
        data = rewritten(random, current[0]) if on_purpose else damaged(random, current[0].data)
        path.write_bytes(data)
        return data

    def read(data: bytes) -> None:
        backbone = current[0].backbone
        model = patches.load_bundle(path, backbone)
        assert on_purpose or data == current[0].data, "a changed byte was not found"
        check(data, model, patches.inspect_bundle(path))

    fuzz("bundles, rewritten" if on_purpose else "bundles, damaged", 40, (patches.BundleError,), make, read)
    assert hashes == {bundle.backbone: bundle.backbone.content_hash() for bundle in bundles}
