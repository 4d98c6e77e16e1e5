"""Files of folded networks: damaged ones, and ones that somebody wrote on purpose, with the hash that fits them."""

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest

import patches
from patches.sealed import UNSEALED, seal
from tests.fuzz.damage import as_text, damaged, edit, value
from tests.fuzz.harness import fuzz
from tests.patches.helpers import small_backbone, small_transformer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("folded")
    found = []
    for backbone in (small_backbone(), small_transformer("small_vit"), small_transformer("small_swin")):
        patches.save_bundle(
            patches.attach(backbone, "scale_bias+last_layer", 3),
            folder / "task.patch",
            classes=["a", "b", "c"],
            preprocessing={"resolution": 16, "mean": [0.5] * 3},
        )
        patches.save_folded(folder / "task.patch", backbone, folder / "plain.safetensors")
        found.append((folder / "plain.safetensors").read_bytes())
    return found


def rewritten(random: Random, data: bytes) -> bytes:
    """Return the file with another manifest, header or values, and with the hash that fits them."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header, payload = json.loads(data[8:end]), data[end:]
    manifest: dict[str, Any] = json.loads(header["__metadata__"]["manifest"]) | {"payload_sha256": UNSEALED}
    kind = random.choice(("manifest", "options", "options", "tensors", "values"))
    if kind == "manifest":
        edit(random, manifest)
    elif kind == "options":
        options = manifest["architecture"]["options"]
        key = random.choice([*options, "width_mult"])
        options[key] = value(random, options.get(key))
    elif kind == "tensors":
        name = random.choice(list(manifest["tensors"]))
        edit(random, header[name])
        manifest["tensors"].pop(name)
    else:
        payload = damaged(random, payload)[: len(payload)].ljust(len(payload), b"\0")
    header["__metadata__"]["manifest"] = as_text(manifest, random)
    text = as_text(header, random).encode("utf-8", "surrogatepass")
    try:
        return seal(struct.pack("<Q", len(text)) + text + payload)[0]
    except ValueError:  # there is no hash any more
        return struct.pack("<Q", len(text)) + text + payload


@pytest.mark.parametrize("on_purpose", [False, True], ids=["damaged", "rewritten"])
def test_a_folded_network_is_whole_or_refused(files: list[bytes], tmp_path: Path, on_purpose: bool) -> None:
    path = tmp_path / "plain.safetensors"

    def make(random: Random) -> bytes:
        data = rewritten(random, random.choice(files)) if on_purpose else damaged(random, random.choice(files))
        path.write_bytes(data)
        return data

    def read(data: bytes) -> None:
        opened = patches.load_folded(path)
        assert on_purpose or data in files, "a changed byte was not found"
        state = opened.network.state_dict()
        assert all(tensor.isfinite().all() and not tensor.is_meta for tensor in state.values())
        assert sum(tensor.nbytes for tensor in state.values()) == len(data) - 8 - struct.unpack("<Q", data[:8])[0]
        assert len(opened.classes) == list(state.values())[-1].shape[0]

    kind = "folded networks, rewritten" if on_purpose else "folded networks, damaged"
    fuzz(kind, 20, (patches.BundleError,), make, read)
