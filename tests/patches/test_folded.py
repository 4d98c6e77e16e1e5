"""Files of folded networks: they open as plain networks, and a file that is damaged or says too much is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import patches
from patches import Backbone, BundleError, PatchError
from patches.fold import merge_norms
from patches.sealed import describe
from tests.patches.helpers import images, rewritten, small_backbone, small_transformer

PREPROCESSING = {"resolution": 16, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
BACKBONE = small_backbone()


def save(folder: Path, backbone: Backbone = BACKBONE, method: str = "scale_bias") -> Path:
    """Write a task's bundle and its folded network, and return the path of the latter."""
    model = patches.attach(backbone, method, 3, seed=6)
    patches.save_bundle(model, folder / "task.patch", classes=["ä", "b", "c"], preprocessing=PREPROCESSING)
    patches.save_folded(folder / "task.patch", backbone, folder / "plain.safetensors")
    return folder / "plain.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return save(tmp_path_factory.mktemp("folded")).read_bytes()


@pytest.mark.parametrize(
    ("build", "size", "method"),
    [
        (small_backbone, 16, "scale_bias"),
        (small_backbone, 16, "scale_bias+last_layer"),
        (small_backbone, 16, "shared"),
        (partial(small_backbone, torch.float64), 16, "scale_bias+last_layer"),
        (partial(small_transformer, "small_vit"), 32, "scale_bias+last_layer"),
        (partial(small_transformer, "small_swin"), 32, "scale_bias"),
    ],
)
def test_a_file_opens_as_the_folded_network(
    tmp_path: Path, build: Callable[[], Backbone], size: int, method: str
) -> None:
    backbone = build()
    path = save(tmp_path, backbone, method)
    model = patches.load_bundle(tmp_path / "task.patch", backbone)

    opened = patches.load_folded(path)

    x = images(3, size, dtype=next(backbone.network.parameters()).dtype)
    with torch.no_grad():
        assert torch.equal(opened.network(x), patches.fold(model)(x))
        torch.testing.assert_close(opened.network(x), model(x), rtol=1e-4, atol=1e-4)
    assert type(opened.network) is type(backbone.network)
    assert not any(module.training or isinstance(module, nn.BatchNorm2d) for module in opened.network.modules())
    assert not any(t.is_meta for t in (*opened.network.parameters(), *opened.network.buffers()))
    assert (opened.classes, opened.preprocessing) == (("ä", "b", "c"), PREPROCESSING)
    assert opened.bundle_sha256 == patches.inspect_bundle(tmp_path / "task.patch").payload_sha256
    assert describe(safetensors.torch.load_file(path)) == describe(opened.network.state_dict())


@pytest.mark.parametrize("name", ["inception_v3", "swin_b"])
def test_large_networks_have_one_folded_structure(name: str) -> None:
    with torch.device("meta"):
        folded = patches.fold(patches.attach(patches.load_backbone(name), "scale_bias+last_layer", 4))
        opened = patches.load_backbone(name, num_classes=4).network
        merge_norms(opened)
    assert describe(opened.state_dict()) == describe(folded.state_dict())


def test_an_opened_network_can_be_trained(tmp_path: Path) -> None:
    opened = patches.load_folded(save(tmp_path)).network
    opened(images(2, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in opened.parameters())


@pytest.mark.parametrize("name", ["plain", "plain.pth", "plain.patch", "plain.safetensors.tmp"])
def test_another_ending_is_an_error_before_anything_is_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match=r"Give a name that ends in \.safetensors"):
        patches.save_folded(tmp_path / "missing.patch", BACKBONE, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_method_that_cannot_be_folded_leaves_no_file(tmp_path: Path) -> None:
    backbone = small_transformer("small_vit")
    model = patches.attach(backbone, "mist", 3)
    patches.save_bundle(model, tmp_path / "task.patch", classes=list("abc"), preprocessing={})
    with pytest.raises(PatchError, match="'mist' cannot be folded"):
        patches.save_folded(tmp_path / "task.patch", backbone, tmp_path / "plain.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["task.patch"]


# Files that are refused


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(BundleError) as error:
        patches.load_folded(path)
    message = str(error.value)
    assert message.startswith(f"Folded network '{path}': expected ")
    assert ", found " in message
    assert len(message) < 1000
    return message


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_byte_anywhere_is_refused(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    position = data.draw(st.one_of(st.integers(0, 200), st.integers(0, len(whole) - 1)))
    edited = bytearray(whole)
    edited[position] ^= data.draw(st.integers(1, 255))
    refused(tmp_path / "edited.safetensors", bytes(edited))


def test_a_cut_file_and_files_of_other_programs_are_refused(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "other.safetensors"
    for data in (b"", b"no network", whole[:-1], whole[:100], safetensors.torch.save(safetensors.torch.load(whole))):
        refused(path, data)
    path.unlink()
    with pytest.raises(BundleError, match="no such file"):
        patches.load_folded(path)


def test_a_bundle_is_no_folded_network_nor_the_other_way_round(tmp_path: Path) -> None:
    plain, bundle = save(tmp_path), tmp_path / "task.patch"
    assert "found the kind 'bundle'. patches.load_bundle reads a bundle" in refused(bundle, bundle.read_bytes())
    with pytest.raises(BundleError, match="expected a bundle, found the kind 'folded network'"):
        patches.inspect_bundle(plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), "expected format 1, found format 2"),
        (lambda m: m.update(kind="spy"), "found the kind 'spy'"),
        (lambda m: m.pop("classes"), "missing, unknown or ill-typed"),
        (lambda m: m.update(extra=1), "missing, unknown or ill-typed"),
        (lambda m: m.update(format=True), "missing, unknown or ill-typed"),
        (lambda m: m.update(classes=["a"]), "missing, unknown or ill-typed"),
        (lambda m: m.update(classes=["a", "b", 3]), "missing, unknown or ill-typed"),
        (lambda m: m["architecture"].update(weights="x"), "missing, unknown or ill-typed"),
        (lambda m: m["architecture"]["options"].update(weights="x"), "missing, unknown or ill-typed"),
        (lambda m: m["architecture"].update(name="mobilenet"), "Did you mean 'mobilenet_v2'"),
        (lambda m: m["architecture"].update(name="resnet18"), "a network that this version knows"),
        (lambda m: m["architecture"]["options"].update(widht_mult=2.0), "Did you mean 'width_mult'"),
        (lambda m: m["architecture"]["options"].update(width_mult=2.0), "of a folded mobilenet_v2"),
        (lambda m: m["architecture"]["options"].update(last_channel=10**12), "of a folded mobilenet_v2"),
        (
            lambda m: m["architecture"]["options"].update(inverted_residual_setting=[[1, 8, 10**9, 1]]),
            "cannot be built",
        ),
        (lambda m: m["tensors"].popitem(), "other tensors than the manifest lists"),
        (lambda m: m.update(preprocessing={"mean": float("nan")}), "NaN, which is no finite number"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    tmp_path: Path, whole: bytes, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    assert message in refused(tmp_path / "other.safetensors", rewritten(whole, change))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(5), "expected [3] float32 as 'classifier.1.bias' of a folded mobilenet_v2, found [5] float32"),
        (torch.zeros(3, dtype=torch.float64), "as 'classifier.1.bias' of a folded mobilenet_v2"),
        (torch.full((3,), float("nan")), "NaN or infinity in tensor 'classifier.1.bias'"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path, whole: bytes, value: torch.Tensor, message: str) -> None:
    tensors = safetensors.torch.load(whole) | {"classifier.1.bias": value}
    data = rewritten(whole, lambda m: m.update(tensors=describe(tensors)), tensors)
    assert message in refused(tmp_path / "other.safetensors", data)


def test_another_tensor_is_named(tmp_path: Path, whole: bytes) -> None:
    tensors = safetensors.torch.load(whole) | {"a\x1b[31mred": torch.zeros(1)}
    data = rewritten(whole, lambda m: m.update(tensors=describe(tensors)), tensors)
    assert "expected no tensor as 'a\\x1b[31mred'" in refused(tmp_path / "other.safetensors", data)
