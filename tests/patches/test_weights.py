"""Weights from files and from torchvision."""

import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torchvision.models import MobileNet_V2_Weights
from torchvision.models._api import WeightsEnum

import patches
from patches import BackboneError
from tests.patches.helpers import SMALL, small_backbone

MISSING, EXTRA, SHAPED = "features.0.0.weight", "features.99.weight", "classifier.1.bias"


def load(path: Path | str, **options: Any) -> patches.Backbone:
    return patches.load_backbone("mobilenet_v2", path, **{"num_classes": 5, **SMALL, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_saved_backbone_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    backbone = small_backbone(dtype)
    backbone.save(tmp_path / "backbone.safetensors")
    assert load(tmp_path / "backbone.safetensors").content_hash() == backbone.content_hash()


def test_a_channels_last_backbone_is_saved_in_contiguous_order(tmp_path: Path) -> None:
    backbone = small_backbone().to(memory_format=torch.channels_last)
    backbone.save(tmp_path / "backbone.safetensors")
    assert load(str(tmp_path / "backbone.safetensors")).content_hash() == small_backbone().content_hash()


def test_a_fresh_process_finds_the_same_hash(tmp_path: Path) -> None:
    backbone = small_backbone()
    backbone.save(tmp_path / "backbone.safetensors")
    code = (
        "import json, sys, patches; a = json.loads(sys.argv[1]);"
        "print(patches.load_backbone(a['name'], sys.argv[2], **a['options']).content_hash())"
    )
    arguments = [patches_json(backbone), str(tmp_path / "backbone.safetensors")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == backbone.content_hash()


def patches_json(backbone: patches.Backbone) -> str:
    return json.dumps(backbone.architecture())


@pytest.mark.parametrize("counters", [True, False])
def test_a_state_dict_saved_by_torch(tmp_path: Path, counters: bool) -> None:
    backbone = small_backbone()
    state = {
        name: tensor
        for name, tensor in backbone.network.state_dict().items()
        if counters or not name.endswith("num_batches_tracked")  # checkpoints of torch before 0.4.1 have none
    }
    torch.save(state, tmp_path / "backbone.pth")
    assert load(tmp_path / "backbone.pth").content_hash() == backbone.content_hash()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_file_that_does_not_fit_names_the_first_of_each_kind(tmp_path: Path, suffix: str) -> None:
    state = dict(small_backbone().network.state_dict())
    del state[MISSING]
    state[EXTRA] = torch.zeros(1)
    state[SHAPED] = torch.zeros(6)
    path = tmp_path / f"backbone.{suffix}"
    safetensors.torch.save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    with pytest.raises(BackboneError) as error:
        load(path)
    message = str(error.value)
    assert f"missing, 1 in all, first '{MISSING}'" in message
    assert f"unexpected, 1 in all, first '{EXTRA}'" in message
    assert f"mis-shaped, 1 in all, first '{SHAPED}' (expected [5] float32, found [6] float32)" in message


def test_a_file_for_another_number_of_classes_does_not_fit(tmp_path: Path) -> None:
    small_backbone().save(tmp_path / "backbone.safetensors")
    with pytest.raises(BackboneError, match=r"mis-shaped, 2 in all, first 'classifier.1.weight'"):
        load(tmp_path / "backbone.safetensors", num_classes=6)


def test_a_file_of_mixed_dtypes_does_not_fit(tmp_path: Path) -> None:
    state = dict(small_backbone().network.state_dict())
    state[SHAPED] = state[SHAPED].double()
    safetensors.torch.save_file(state, tmp_path / "backbone.safetensors")
    with pytest.raises(BackboneError, match=r"expected \[5\] float32, found \[5\] float64"):
        load(tmp_path / "backbone.safetensors")


@pytest.mark.parametrize("name", ["backbone.safetensors", "backbone.pth"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"\xff" * 64])
def test_a_file_that_is_no_weights_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BackboneError, match="cannot be read"):
        load(tmp_path / name)


def test_a_file_that_holds_more_than_tensors(tmp_path: Path) -> None:
    torch.save({"state_dict": small_backbone().network.state_dict()}, tmp_path / "nested.pt")
    with pytest.raises(BackboneError, match="not a state dict of tensors"):
        load(tmp_path / "nested.pt")
    torch.save(small_backbone().network, tmp_path / "pickle.pt")
    with pytest.raises(BackboneError, match="cannot be read"):
        load(tmp_path / "pickle.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_values_that_are_not_finite_are_refused_by_the_tensors_name(tmp_path: Path, suffix: str, value: float) -> None:
    state = {name: tensor.clone() for name, tensor in small_backbone().network.state_dict().items()}
    state["features.0.1.running_var"][3] = value
    path = tmp_path / f"backbone.{suffix}"
    safetensors.torch.save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    with pytest.raises(BackboneError, match=r"tensor 'features\.0\.1\.running_var' holds NaN or infinity"):
        load(path)


def test_fetched_values_that_are_not_finite_are_refused(download: dict[str, torch.Tensor]) -> None:
    download["features.0.1.weight"][0] = float("nan")
    with pytest.raises(BackboneError, match=r"tensor 'features\.0\.1\.weight' holds NaN or infinity"):
        patches.load_backbone("mobilenet_v2", "IMAGENET1K_V2")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (7, torch.zeros(1), "holds a Tensor under 7"),
        ("epoch", 3, "holds a int under 'epoch'"),
        ("x" * 10_000, None, "holds a NoneType under 'xxx"),
        ("sparse", torch.zeros(2, 2).to_sparse(), "holds a Tensor under 'sparse'"),
        ("hollow", torch.zeros(2, device="meta"), "holds a Tensor under 'hollow'"),
        (EXTRA, torch.zeros(1).expand(10**6, 10**6), f"unexpected, 1 in all, first '{EXTRA}'"),
    ],
)
def test_an_entry_that_is_no_plain_tensor_is_named(tmp_path: Path, name: Any, value: Any, message: str) -> None:
    torch.save({**small_backbone().network.state_dict(), name: value}, tmp_path / "odd.pth")
    with pytest.raises(BackboneError) as error:
        load(tmp_path / "odd.pth")
    assert message in str(error.value)
    assert len(str(error.value)) < 1000


def test_an_object_that_is_no_tensor_is_named_without_advice_to_unpickle_it(tmp_path: Path) -> None:
    torch.save({"model": small_backbone().network.state_dict(), "path": tmp_path}, tmp_path / "object.pth")
    with pytest.raises(BackboneError) as error:
        load(tmp_path / "object.pth")
    assert "it holds pathlib.PosixPath, and only tensors are unpickled" in str(error.value)
    assert "weights_only" not in str(error.value)


def scripted(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)


def global_of(name: bytes) -> bytes:
    """Return a pickle that asks for a class of a name."""
    return b"\x80\x02c" + name.replace(b".", b"\n", 1) + b"\n."


def zipped(path: Path, pickled: bytes, name: str = "data.pkl") -> None:
    with zipfile.ZipFile(path, "w") as package:
        package.writestr(f"archive/{name}", pickled)
        package.writestr("archive/version", b"3\n")


class Ran:
    """Fails if it is unpickled."""

    def __reduce__(self) -> tuple:
        return pytest.fail, ("unpickled",)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: torch.save(Ran(), path), "only tensors are unpickled"),
        (lambda path: torch.save(Ran(), path, _use_new_zipfile_serialization=False), "only tensors are unpickled"),
        (lambda path: path.write_bytes(pickle.dumps(Ran(), protocol=2)), "only tensors are unpickled"),
        (lambda path: path.write_bytes(pickle.dumps(Ran(), protocol=4)), "cannot be read"),
        (lambda path: zipped(path, global_of(b"os.\x1b[2J\x1b]0;all is well\x07")), "it holds os.\\x1b[2J"),
        (lambda path: zipped(path, global_of(b"torch.load(weights_only=False)")), "it is damaged"),
        (lambda path: zipped(path, global_of(b"torch.hub.load")), "it holds torch.hub.load, and"),
        (lambda path: zipped(path, b"", "constants.pkl"), "it holds a TorchScript model"),
        (scripted, "no TorchScript model"),
    ],
)
def test_no_message_advises_to_unpickle_a_file_or_has_escape_codes(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "hostile.pth")
    with pytest.raises(BackboneError, match="cannot be read") as error:
        load(tmp_path / "hostile.pth")
    text = str(error.value)
    assert message in text
    assert not [word for word in ("weights_only", "torch.load", "torch.jit", "trust", "\x1b", "\n") if word in text]
    assert len(text) < 1000


class Zeros:
    """Unpickles as 2 GB of zeros, from a file of a few bytes."""

    def __reduce__(self) -> tuple:
        return bytearray, (2 * 10**9,)


@pytest.mark.parametrize("new", [True, False])
def test_a_short_file_cannot_make_gigabytes(tmp_path: Path, new: bool) -> None:
    torch.save({"zeros": Zeros()}, tmp_path / "zeros.pth", _use_new_zipfile_serialization=new)
    with pytest.raises(BackboneError, match=r"it holds .*bytearray, and only tensors are unpickled"):
        load(tmp_path / "zeros.pth")


def test_a_file_of_an_old_torch_is_read(tmp_path: Path) -> None:
    backbone = small_backbone()
    torch.save(backbone.network.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load(tmp_path / "old.pth").content_hash() == backbone.content_hash()


def test_a_compressed_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    torch.save({"zeros": torch.zeros(10_000)}, tmp_path / "stored.pth")
    with (
        zipfile.ZipFile(tmp_path / "stored.pth") as stored,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for member in stored.namelist():
            small.writestr(member, stored.read(member))
    with pytest.raises(BackboneError, match="which is compressed or encrypted"):
        load(tmp_path / "small.pth")


def test_a_changed_byte_in_a_tensor_is_found_by_its_checksum(tmp_path: Path) -> None:
    state = small_backbone().network.state_dict()
    torch.save(state, tmp_path / "backbone.pth")
    data = bytearray((tmp_path / "backbone.pth").read_bytes())
    data[data.index(state["classifier.1.weight"].numpy().tobytes()) + 5] ^= 1
    (tmp_path / "backbone.pth").write_bytes(data)
    with pytest.raises(BackboneError, match=r"cannot be read: no whole .* \(Bad CRC-32"):
        load(tmp_path / "backbone.pth")


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "overlap.safetensors"
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in ("one", "other")}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    with pytest.raises(BackboneError, match="tensor 'other', which overlaps the one before it"):
        load(path)


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 10**9},
        {"last_channel": 10**9},
        {"width_mult": 1e6},
        {"inverted_residual_setting": [[1, 8, 10**6, 1]]},
        {"inverted_residual_setting": 5},
    ],
)
def test_options_cannot_ask_for_more_than_the_file_holds(tmp_path: Path, options: dict) -> None:
    small_backbone().save(tmp_path / "backbone.safetensors")
    with pytest.raises(BackboneError, match=r"does not fit|cannot be built") as error:
        load(tmp_path / "backbone.safetensors", **options)
    assert len(str(error.value)) < 1000


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    for name in ("none.safetensors", "none.pth"):
        with pytest.raises(BackboneError, match="does not exist"):
            load(tmp_path / name)


def test_unknown_torchvision_weights() -> None:
    with pytest.raises(BackboneError, match="Did you mean 'IMAGENET1K_V"):
        patches.load_backbone("mobilenet_v2", "IMAGENET1K_V3")


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Replace torchvision's download by a MobileNetV2 with 1000 classes, and return its state dict."""
    state = patches.load_backbone("mobilenet_v2", seed=9).network.state_dict()

    def get_state_dict(weights: WeightsEnum, **options: bool) -> dict[str, torch.Tensor]:
        assert weights is MobileNet_V2_Weights.IMAGENET1K_V2
        assert options == {"progress": False, "check_hash": True, "weights_only": True}
        return state

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    return state


def test_torchvision_weights_by_name(download: dict[str, torch.Tensor]) -> None:
    loaded = patches.load_backbone("mobilenet_v2", "IMAGENET1K_V2").network.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in download.items())


def test_another_number_of_classes_takes_the_trunk_and_a_fresh_head(download: dict[str, torch.Tensor]) -> None:
    loaded = patches.load_backbone("mobilenet_v2", "IMAGENET1K_V2", num_classes=7, seed=1).network.state_dict()
    fresh = patches.load_backbone("mobilenet_v2", num_classes=7, seed=1).network.state_dict()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, (fresh if name.startswith("classifier") else download)[name])


def test_torchvision_weights_do_not_fit_another_width(download: dict[str, torch.Tensor]) -> None:
    assert download
    with pytest.raises(BackboneError, match="mis-shaped"):
        patches.load_backbone("mobilenet_v2", "IMAGENET1K_V2", width_mult=0.5)


@pytest.mark.parametrize(("aux_logits", "num_classes"), [(True, 1000), (True, 7), (False, 7)])
def test_torchvision_weights_of_inception(monkeypatch: pytest.MonkeyPatch, aux_logits: bool, num_classes: int) -> None:
    state = patches.load_backbone("inception_v3", seed=9).network.state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: state)
    backbone = patches.load_backbone(
        "inception_v3", "IMAGENET1K_V1", num_classes=num_classes, seed=1, aux_logits=aux_logits
    )
    assert backbone.options["transform_input"] is True
    heads = ("fc.", "AuxLogits.fc.")
    for name, tensor in backbone.network.state_dict().items():
        assert tensor.shape[0] == num_classes if name.startswith(heads) else torch.equal(tensor, state[name])
    assert (backbone.auxiliary is not None) == aux_logits


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("no route"), "no route"),
        (RuntimeError("Cannot use ``weights_only=True`` with this; \x1b[1mset it to False"), "it is damaged"),
    ],
)
def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def get_state_dict(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    with pytest.raises(BackboneError, match=rf"fetched: {message}.*give the file's path") as raised:
        patches.load_backbone("mobilenet_v2", "IMAGENET1K_V2")
    assert "weights_only" not in str(raised.value)


def test_fetched_weights_are_not_unpickled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fetched = tmp_path / "checkpoints" / Path(MobileNet_V2_Weights.IMAGENET1K_V2.url).name
    fetched.parent.mkdir()
    torch.save(small_backbone().network, fetched)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(BackboneError, match=r"it holds torchvision.*MobileNetV2, and only tensors"):
        patches.load_backbone("mobilenet_v2", "IMAGENET1K_V2")
