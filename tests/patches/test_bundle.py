"""Bundles: round trips are exact, and a file that is damaged or made for another backbone is refused."""

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import patches
from patches import BundleError, PatchedModel
from patches.sealed import UNSEALED, seal
from tests.patches.helpers import SMALL, bits, images, rewritten, small_backbone, small_transformer, train

BACKBONE = small_backbone()
QUICK = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def trained(method: str = "scale_bias", **options: Any) -> PatchedModel:
    model = patches.attach(BACKBONE, method, 3, seed=6, **options)
    train(model)
    return model


def save(model: PatchedModel, path: Path, **changes: Any) -> bytes:
    patches.save_bundle(model, path, **{"classes": ["a", "b", "c"], "preprocessing": {"size_px": 16}} | changes)
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return save(trained(), tmp_path_factory.mktemp("bundle") / "task.patch")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("scale_bias", {"statistics": "source"}),
        ("scale_bias+last_layer", {}),
        ("norm_statistics", {}),
        ("full", {}),
        ("shared", {}),
    ],
)
def test_a_round_trip_is_bit_exact(tmp_path: Path, method: str, options: dict) -> None:
    model, x = trained(method, **options), images(4, 16)
    data = save(model, tmp_path / "task.patch")
    again = patches.load_bundle(tmp_path / "task.patch", small_backbone())
    assert bits(again.private_state()) == bits(model.private_state())
    assert again.classes == ("a", "b", "c")
    assert (again.method, again.options, again.head) == (model.method, model.options, model.head)
    assert again.fixed_head == model.fixed_head
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert save(again, tmp_path / "again.patch") == data
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["again.patch", "task.patch"]


@QUICK
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_any_finite_bit_pattern_survives(tmp_path: Path, patterns: list[float], dtype: torch.dtype) -> None:
    """These include subnormals and -0.0. Two finite float32 numbers side by side are a finite float64 number."""
    backbone = BACKBONE if dtype == torch.float32 else small_backbone(dtype)
    model = patches.attach(backbone, "scale_bias+last_layer", 3)
    words = torch.tensor(patterns, dtype=torch.float32).view(torch.int32)
    for tensor in model.private_state().values():
        raw = tensor.detach().view(-1).view(torch.int32) if tensor.dim() else tensor.detach().view(1).view(torch.int32)
        raw.copy_(words.repeat(raw.numel() // len(words) + 1)[: raw.numel()])
    save(model, tmp_path / "task.patch")
    again = patches.load_bundle(tmp_path / "task.patch", backbone)
    assert bits(again.private_state()) == bits(model.private_state())


def test_a_private_head_of_the_backbones_size_and_a_shared_head(tmp_path: Path) -> None:
    for method, head in (("scale_bias", "shared"), ("last_layer", "private")):
        model = patches.attach(BACKBONE, method)
        save(model, tmp_path / "task.patch", classes=list("abcde"))
        again = patches.load_bundle(tmp_path / "task.patch", BACKBONE)
        assert (again.head, again.num_classes) == (head, 5)
        assert torch.equal(again(images(1, 16)), model(images(1, 16)))


def test_tensors_that_are_views_of_one_flat_buffer_are_saved(tmp_path: Path) -> None:
    model = trained()
    before = save(model, tmp_path / "task.patch")
    for dtype in (torch.float32, torch.int64):
        tensors = [tensor for tensor in model.private_state().values() if tensor.dtype == dtype]
        flat, start = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]), 0
        for tensor in tensors:
            tensor.data = flat[start : start + tensor.numel()].view_as(tensor)
            start += tensor.numel()
    assert save(model, tmp_path / "task.patch") == before


def test_inspecting_tells_what_is_inside_and_builds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bytes
) -> None:
    assert whole
    model = trained()
    saved = patches.save_bundle(
        model,
        tmp_path / "task.patch",
        classes=["ä", "b", '"c\\'],
        preprocessing={"mean": [0.5]},
        metrics={"top1": 90.5},
    )
    monkeypatch.setattr(torch.nn.Module, "__init__", None)
    info = patches.inspect_bundle(tmp_path / "task.patch")
    assert info == saved
    assert (info.format, info.method, info.options) == (1, "scale_bias", {"statistics": "batch"})
    assert (info.num_classes, info.classes, info.metrics) == (3, ["ä", "b", '"c\\'], {"top1": 90.5})
    assert info.preprocessing == {"mean": [0.5]}
    assert info.fixed_head == model.fixed_head
    assert info.backbone == {**BACKBONE.architecture(), "content_hash": BACKBONE.content_hash()}
    assert info.tensors["features.0.1.weight"] == {"shape": [32], "dtype": "float32"}
    assert list(info.tensors) == list(model.private_names)


def test_verifying_gives_the_manifest(tmp_path: Path) -> None:
    save(trained(), tmp_path / "task.patch")
    path = tmp_path / "task.patch"
    assert patches.verify_bundle(path, small_backbone()) == patches.inspect_bundle(path)


# Files that are refused


def refused(path: Path, data: bytes, backbone: patches.Backbone = BACKBONE) -> str:
    """Return the message of the error, after checking that neither the backbone nor a model on it has changed."""
    path.write_bytes(data)
    before = backbone.content_hash()
    for read in (patches.load_bundle, patches.verify_bundle):
        with pytest.raises(BundleError):
            read(path, backbone)
    with pytest.raises(BundleError) as error:
        patches.load_bundle(path, backbone)
    assert backbone.content_hash() == before
    assert str(path) in str(error.value)
    assert "expected" in str(error.value)
    assert "found" in str(error.value)
    return str(error.value)


@settings(QUICK, max_examples=300)
@given(st.data())
def test_a_changed_byte_anywhere_is_refused(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    position = data.draw(st.one_of(st.integers(0, 200), st.integers(0, len(whole) - 1)))
    edited = bytearray(whole)
    edited[position] ^= data.draw(st.integers(1, 255))
    (tmp_path / "edited.patch").write_bytes(edited)
    with pytest.raises(BundleError):
        patches.inspect_bundle(tmp_path / "edited.patch")


def test_a_changed_padding_byte_is_refused(tmp_path: Path) -> None:
    for length in range(8):  # one of eight lengths of the header needs padding
        whole = save(trained(), tmp_path / "task.patch", metrics={"note": "x" * length})
        end = 8 + struct.unpack("<Q", whole[:8])[0]
        if whole[end - 1 : end] == b" ":
            break
    assert "edited" in refused(tmp_path / "edited.patch", whole[: end - 1] + b"\t" + whole[end:])
    shorter = struct.pack("<Q", end - 9) + whole[8:]  # the header without its last padding byte is still JSON
    (tmp_path / "edited.patch").write_bytes(shorter)
    with pytest.raises(BundleError, match="edited"):
        patches.inspect_bundle(tmp_path / "edited.patch")


@QUICK
@given(st.data())
def test_a_cut_or_longer_file_is_refused(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, len(whole) - 1))
    refused(tmp_path / "cut.patch", whole[:size])
    refused(tmp_path / "long.patch", whole + whole[:size] + b"\0")


@QUICK
@given(st.binary(max_size=200))
def test_any_other_file_is_refused(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path / "other.patch", content)
    refused(tmp_path / "other.patch", struct.pack("<Q", len(content)) + content)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"1" * 5_000,
        b'{"__metadata__":{"manifest":"' + b"[" * 100_000 + b'"}}',
        b'{"__metadata__":{"manifest":3}}',
        b'{"__metadata__":{"manifest":"[]"}}',
        b'{"__metadata__":{"manifest":"{\\"format\\":1}"}}',
        b'{"__metadata__":[]}',
        b"\xff\xfe",
    ],
)
def test_odd_headers_are_refused(tmp_path: Path, header: bytes) -> None:
    refused(tmp_path / "odd.patch", struct.pack("<Q", len(header)) + header)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**12])
def test_a_header_that_claims_to_be_huge_is_refused(tmp_path: Path, whole: bytes, length: int) -> None:
    assert "end before the header" in refused(tmp_path / "huge.patch", struct.pack("<Q", length) + whole[8:])


def test_a_rewritten_bundle_is_as_good_as_new(tmp_path: Path, whole: bytes) -> None:
    (tmp_path / "same.patch").write_bytes(rewritten(whole, lambda _: None))
    patches.load_bundle(tmp_path / "same.patch", BACKBONE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), "expected format 1, found format 2"),
        (lambda m: m.update(format="new", unknown=1), "found format 'new'"),
        (lambda m: m.pop("classes"), "missing, unknown or ill-typed"),
        (lambda m: m.update(extra=1), "missing, unknown or ill-typed"),
        (lambda m: m.update(options=[]), "missing, unknown or ill-typed"),
        (lambda m: m.update(num_classes=4), "missing, unknown or ill-typed"),
        (lambda m: m.update(backbone={}), "missing, unknown or ill-typed"),
        (lambda m: m["backbone"]["options"].update(weights="x"), "missing, unknown or ill-typed"),
        (lambda m: m.update(fixed_head={"seed": 6}), "missing, unknown or ill-typed"),
        (lambda m: m["fixed_head"].update(sha256="0" * 64), "use the torch version that wrote the bundle"),
        (lambda m: m["fixed_head"].update(seed=7), "use the torch version that wrote the bundle"),
        (lambda m: m["fixed_head"].update(seed="six"), "missing, unknown or ill-typed"),
        (lambda m: m["fixed_head"].update(seed=True), "missing, unknown or ill-typed"),
        (lambda m: m.update(format=True), "missing, unknown or ill-typed"),
        (lambda m: m.update(classes=["a", "b", 3]), "missing, unknown or ill-typed"),
        (lambda m: m["tensors"]["features.0.1.weight"].update(shape=[32.0]), "other tensors than the manifest lists"),
        (lambda m: m.update(classes=["a", "b", "\ud800"]), "surrogates not allowed"),
        (lambda m: m.update(metrics={"top1": float("nan")}), "NaN, which is no finite number"),
        (lambda m: m.update(metrics=nested(40)), "more than 32 lists and dicts inside each other"),
        (lambda m: m.update(method="+".join(["full"] * 1000)), "names 'full' twice"),
        (lambda m: m["fixed_head"].update(seed=2**80), "one that does not"),
        (lambda m: m.update(head="private"), "a fixed head"),
        (lambda m: m.update(method="scale_bais"), "Did you mean 'scale_bias'"),
        (lambda m: m.update(method="norm_statistics", options={}), "one that does not"),
        (lambda m: m.update(options={"statistics": []}), "statistics=[]"),
        (lambda m: m.update(options={"seed": 1}), "one that does not"),
        (lambda m: m["tensors"].popitem(), "other tensors than the manifest lists"),
        (lambda m: m["backbone"].update(content_hash="0" * 64), f"found {BACKBONE.content_hash()}"),
        (lambda m: m["backbone"].update(name="resnet18"), "expected backbone 'resnet18', found 'mobilenet_v2'"),
        (lambda m: m["backbone"]["options"].update(width_mult=0.5), "with width_mult=0.5, found width_mult=1.0"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    tmp_path: Path, whole: bytes, change: Callable[[dict], object], message: str
) -> None:
    assert message in refused(tmp_path / "other.patch", rewritten(whole, change))


def nested(levels: int) -> dict:
    return {"deeper": nested(levels - 1)} if levels else {}


@pytest.mark.parametrize("value", [torch.zeros(31), torch.zeros(32, dtype=torch.float64)])
def test_tensors_of_another_shape_or_dtype_are_refused(tmp_path: Path, whole: bytes, value: torch.Tensor) -> None:
    name = "features.0.1.weight"
    described = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    tensors = safetensors.torch.load(whole) | {name: value}
    data = rewritten(whole, lambda m: m["tensors"].update({name: described}), tensors)
    assert f"Private tensor '{name}': expected shape [32] float32" in refused(tmp_path / "other.patch", data)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_neither_written_nor_read(tmp_path: Path, whole: bytes, value: float) -> None:
    name = "features.0.1.weight"
    model = trained()
    with torch.no_grad():
        model.private_state()[name][7] = value
    with pytest.raises(BundleError, match=f"NaN or infinity in tensor '{name}'"):
        save(model, tmp_path / "task.patch")
    assert not (tmp_path / "task.patch").exists()

    tensors = safetensors.torch.load(whole)
    tensors[name][7] = value
    assert f"NaN or infinity in tensor '{name}'" in refused(
        tmp_path / "task.patch", rewritten(whole, lambda _: None, tensors)
    )


def relaid(whole: bytes, change: Callable[[dict], object]) -> bytes:
    """Return the bundle with another header over the same tensor bytes, and with the hash that fits them."""
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8:end])
    manifest = json.loads(header["__metadata__"]["manifest"]) | {"payload_sha256": UNSEALED}
    header["__metadata__"]["manifest"] = json.dumps(manifest, separators=(",", ":"))
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    return seal(struct.pack("<Q", len(text)) + text + whole[end:])[0]


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (lambda start, end: [start + 4, end + 4], "leaves a hole"),
        (lambda start, end: [start - 4, end - 4], "overlaps the one before it"),
        (lambda start, end: [start, end + 4], "ill-formed entry"),
        (lambda start, end: [float(start), end], "ill-formed entry"),
    ],
)
def test_tensors_that_overlap_or_leave_a_hole_are_refused(
    tmp_path: Path, whole: bytes, offsets: Callable[[int, int], list], message: str
) -> None:
    def move(header: dict) -> None:
        entry = header["features.2.conv.1.1.weight"]
        entry["data_offsets"] = offsets(*entry["data_offsets"])

    (tmp_path / "same.patch").write_bytes(relaid(whole, lambda _: None))
    patches.load_bundle(tmp_path / "same.patch", BACKBONE)
    assert message in refused(tmp_path / "moved.patch", relaid(whole, move))


def test_bytes_that_belong_to_no_tensor_are_refused(tmp_path: Path, whole: bytes) -> None:
    name = "features.0.1.weight"

    def forget(header: dict) -> None:
        manifest = json.loads(header["__metadata__"]["manifest"])
        del header[name], manifest["tensors"][name]
        header["__metadata__"]["manifest"] = json.dumps(manifest, separators=(",", ":"))

    assert "leaves a hole" in refused(tmp_path / "hole.patch", relaid(whole, forget))
    longer = relaid(whole + b"\0" * 4, lambda _: None)
    assert "of which the tensors fill" in refused(tmp_path / "longer.patch", longer)


def test_a_manifest_that_names_a_key_twice_is_refused(tmp_path: Path, whole: bytes) -> None:
    def double(header: dict) -> None:
        text = header["__metadata__"]["manifest"]
        header["__metadata__"]["manifest"] = text[:-1] + ',"method":"full"}'

    assert "the key 'method' twice" in refused(tmp_path / "double.patch", relaid(whole, double))


SIDE = {"mist": "small_vit", "dtl_plus": "small_vit", "parasite": "mobilenet"}
"""Side method -> the network that it is tried on."""


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mist", {"rank": 10**6}),
        ("mist", {"rank": 10**18}),
        ("mist", {"rank": 10**30}),
        ("mist", {"layers": 10**6}),
        ("dtl_plus", {"rank": 10**7}),
        ("dtl_plus", {"kernel_size": 10**6}),
        ("dtl_plus", {"beta": True}),
        ("dtl_plus", {"beta": 10**400}),
        ("parasite", {"ratio": True}),
        ("parasite", {"ratio": "0.1"}),
        ("parasite", {"ratio": None, "target_percent": 1e308}),
        ("parasite", {"init": "slice" * 10**5}),
    ],
)
def test_a_bundle_cannot_ask_for_more_than_its_tensors(
    tmp_path: Path, method: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = small_transformer("small_vit") if SIDE[method] == "small_vit" else BACKBONE
    model = patches.attach(backbone, method, 3, **({"ratio": 0.5} if method == "parasite" else {}))
    whole = save(model, tmp_path / "task.patch")
    data = rewritten(whole, lambda manifest: manifest["options"].update(options))
    patches.load_bundle(tmp_path / "task.patch", backbone)

    # The real patch is not even begun: what a bundle asks for is compared on the meta device.
    monkeypatch.setattr("patches.bundle.attach", None)
    assert len(refused(tmp_path / "task.patch", data, backbone)) < 1000


def test_a_message_quotes_little_of_what_a_bundle_says(tmp_path: Path, whole: bytes) -> None:
    long = "ab" * 1_000
    changes: list[Callable[[dict], object]] = [
        lambda m: m.update(format=long),
        lambda m: m.update(method=long),
        lambda m: m.update(method="scale_bias", options={long: long}),
        lambda m: m.update(options={"statistics": [long] * 30}),
        lambda m: m.update(head=long),
        lambda m: m["fixed_head"].update(sha256=long),
        lambda m: m["backbone"].update(name=long),
        lambda m: m["backbone"].update(content_hash=long),
        lambda m: m["backbone"]["options"].update({long: long}),
        lambda m: m["backbone"]["options"].update(width_mult={long: [long]}),
        lambda m: m["tensors"].update({long: long}),
    ]
    for change in changes:
        message = refused(tmp_path / "long.patch", rewritten(whole, change))
        assert len(message) < 1000
        assert long[:201] not in message


def test_another_backbone_is_refused(tmp_path: Path, whole: bytes) -> None:
    other = small_backbone()
    other.network.features[0][0].weight.data[0, 0, 0, 0] += 1e-6
    assert "content hash" in refused(tmp_path / "task.patch", whole, other)
    assert "num_classes=5" in refused(
        tmp_path / "task.patch", whole, patches.load_backbone("mobilenet_v2", num_classes=6, **SMALL)
    )


@pytest.mark.parametrize("name", [".", "none.patch"])
def test_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="Check the path"):
        patches.inspect_bundle(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["a", "b"]}, "expected 3 class names"),
        ({"classes": ["a", "b", 3]}, "expected 3 class names"),
        ({"preprocessing": {"mean": torch.zeros(3)}}, "JSON can hold"),
        ({"metrics": {"top1": float("nan")}}, "JSON can hold"),
    ],
)
def test_what_cannot_be_saved(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        save(trained(), tmp_path / "task.patch", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_left_its_backbone_is_not_saved(tmp_path: Path) -> None:
    model = patches.attach(small_backbone(), "last_layer", 3)
    weight = model.network.features[0][0].weight
    weight.data = weight.data.clone()
    save(model, tmp_path / "same_values.patch")
    weight.data += 1
    with pytest.raises(BundleError, match=r"'features\.0\.0\.weight' to be the backbone's"):
        save(model, tmp_path / "task.patch")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = save(trained(), tmp_path / "task.patch")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save(trained("last_layer"), tmp_path / "task.patch")
    assert [path.name for path in tmp_path.iterdir()] == ["task.patch"]
    assert (tmp_path / "task.patch").read_bytes() == whole


def test_a_reader_of_the_old_file_keeps_it(tmp_path: Path) -> None:
    whole = save(trained(), tmp_path / "task.patch")
    with open(tmp_path / "task.patch", "rb") as reader:
        assert save(trained("last_layer"), tmp_path / "task.patch") != whole
        assert reader.read() == whole


def test_the_info_is_frozen(tmp_path: Path) -> None:
    save(trained(), tmp_path / "task.patch")
    with pytest.raises(dataclasses.FrozenInstanceError):
        patches.inspect_bundle(tmp_path / "task.patch").method = "full"  # type: ignore[misc]
