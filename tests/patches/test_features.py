"""Feature files, and MIST's edge network, which is trained from one in a separate process."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import patches.edge
from patches.edge import labels_in, make_edge, predict, train_edge
from patches.errors import FeatureError
from patches.features import FeatureFile, Rows, write_features
from patches.methods.mist import Edge, Gather
from tests.patches.helpers import images, small_transformer

ROOT = Path(__file__).parents[2]
CLASSES = ["ant", "bee", "cat"]
EDGE = """
import json, runpy, sys
runpy.run_module("patches.edge", run_name="__main__")
heavy = ("torchvision", "ray", "mlflow", "multitask", "jobs")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


def rows(start: int, features: dict[str, Tensor]) -> Rows:
    count = len(next(iter(features.values())))
    return Rows(np.arange(start, start + count), np.arange(count) % 3, features)


def read(file: FeatureFile, name: str, places: list[int]) -> Tensor:
    batch = file.layouts[name].empty(len(places))
    file.read(name, places, batch, range(len(places)))
    return batch


def maps_file(folder: Path, dtype: torch.dtype = torch.float32, count: int = 20) -> tuple[FeatureFile, Tensor]:
    """Return maps of a small ViT, and the images that they were computed from."""
    backbone = small_transformer("small_vit")
    x = images(count, 32)
    about = {"backbone": backbone.identity(), "k": 3, "classes": CLASSES, "preprocessing": {"resolution": 32}}
    maps = Gather(backbone)(x, 3).to(dtype)
    write_features(folder / "maps.arrow", about, [rows(0, {"maps": maps[:12]}), rows(12, {"maps": maps[12:]})])
    return FeatureFile(folder / "maps.arrow"), x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_come_back_in_any_order_with_their_bits_and_strides(tmp_path: Path, dtype: torch.dtype) -> None:
    map_nchw = images(5, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    tokens = images(5, 4, seed=1).to(dtype)[:, :2].flatten(2)  # a view with gaps
    parts = [rows(0, {"1": map_nchw[:3], "2": tokens[:3]}), rows(3, {"1": map_nchw[3:], "2": tokens[3:]})]
    write_features(tmp_path / "a.arrow", {"of": "something"}, parts)

    file = FeatureFile(tmp_path / "a.arrow")
    places = [4, 0, 3, 3, 1]

    assert file.about == {"of": "something"}
    assert file.rows.tolist() == [0, 1, 2, 3, 4]
    assert file.labels.tolist() == [0, 1, 2, 0, 1]
    assert torch.equal(read(file, "1", places), map_nchw[places])
    assert read(file, "1", places).stride() == map_nchw.stride()
    assert torch.equal(read(file, "2", places), tokens[places])


def test_any_arrow_reader_finds_the_same_numbers_and_nothing_else(tmp_path: Path) -> None:
    maps = images(4, 4).flatten(1)
    write_features(tmp_path / "a.arrow", {}, [rows(0, {"maps": maps})])

    table = pa.ipc.open_file(tmp_path / "a.arrow").read_all()

    assert table.column_names == ["row", "label", "maps"]
    assert table["maps"].to_pylist() == maps.tolist()
    assert table["maps"].nbytes == maps.nbytes


def test_a_file_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write_features(path, {}, [rows(0, {"maps": images(4, 4)})])
    whole = path.read_bytes()

    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FeatureError, match="cannot be read as a feature file"):
        FeatureFile(path)
    with pytest.raises(FeatureError, match="cannot be read as a feature file"):
        FeatureFile(tmp_path / "missing.arrow")


def test_a_writer_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def batches():  # type: ignore[no-untyped-def]
        yield rows(0, {"maps": images(2, 4)})
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_features(tmp_path / "a.arrow", {}, batches())
    with pytest.raises(FeatureError, match="no images"):
        write_features(tmp_path / "a.arrow", {}, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "row_bytes"), [(torch.float32, 605_184), (torch.float16, 302_592)])
def test_the_message_of_vit_b_16_is_as_large_as_the_paper_says(
    tmp_path: Path, dtype: torch.dtype, row_bytes: int
) -> None:
    """Check the size on the Arrow table's buffers."""
    write_features(tmp_path / "a.arrow", {}, [rows(0, {"maps": torch.zeros(3, 197, 768, dtype=dtype)})])

    column = pa.ipc.open_file(tmp_path / "a.arrow").read_all()["maps"]

    assert column.nbytes / 3 == row_bytes
    assert FeatureFile(tmp_path / "a.arrow").layouts["maps"].row_bytes == row_bytes


def test_the_edge_learns_as_torchs_adam_would_whatever_the_chunk(tmp_path: Path) -> None:
    maps, _ = maps_file(tmp_path)
    x, labels = read(maps, "maps", list(range(20))), torch.from_numpy(maps.labels)
    expected = make_edge(maps, rank=4)
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(3):
        order = torch.randperm(20, generator=generator)
        for batch in (order[:8], order[8:16]):
            loss = functional.cross_entropy(expected(x[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())

    edge = make_edge(maps, rank=4)
    found = train_edge(edge, maps, epochs=3, rate=0.01, batch_size=8, chunk=3)

    assert losses[-1] != losses[0]
    assert found == pytest.approx(losses, abs=1e-5)
    for name, tensor in edge.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_maps_of_another_kind_and_too_few_are_refused(tmp_path: Path) -> None:
    maps, _ = maps_file(tmp_path, count=20)
    write_features(tmp_path / "other.arrow", {}, [rows(0, {"7": images(4, 4)})])

    with pytest.raises(FeatureError, match=r"holds no gathered maps.*multitask gather"):
        make_edge(FeatureFile(tmp_path / "other.arrow"))
    with pytest.raises(FeatureError, match="20 images, and a batch takes 32"):
        train_edge(make_edge(maps), maps, epochs=1, rate=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_edge_process_without_a_backbone_makes_a_bundle_for_the_full_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """For maps in float32 it is a process of its own, which imports neither torchvision nor anything of a cluster."""
    maps, x = maps_file(tmp_path, dtype)
    where = (str(maps.path), "--validation", str(maps.path), "--out", str(tmp_path / "task.patch"))
    how = ("--epochs", "3", "--rate", "0.02", "--batch-size", "8", "--layers", "2", "--rank", "4", "--threads", "1")
    if dtype == torch.float32:
        done = subprocess.run(
            [sys.executable, "-c", EDGE, *where, *how], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert json.loads(done.stdout.splitlines()[-1]) == []
    else:
        monkeypatch.setattr(sys, "argv", ["edge", *where, *how])
        patches.edge.main()

    model = patches.load_bundle(tmp_path / "task.patch", small_transformer("small_vit"))

    info = patches.inspect_bundle(tmp_path / "task.patch")
    fresh = make_edge(maps, layers=2, rank=4)
    edge = make_edge(maps, layers=2, rank=4)
    edge.load_state_dict(model.private_state())
    assert not torch.equal(edge.side.blocks[0].function.out.weight, fresh.side.blocks[0].function.out.weight)
    with torch.no_grad():
        logits = model(x)
    right = (predict(edge, maps).argmax(1) == torch.from_numpy(maps.labels)).double().mean().item()
    assert info.metrics["validation_top1"] == pytest.approx(100 * right)
    if dtype == torch.float32:
        assert torch.equal(predict(edge, maps, chunk=20), logits)
    else:
        torch.testing.assert_close(predict(edge, maps), logits, rtol=1e-2, atol=1e-2)


def test_labels_of_validation_maps_are_matched_by_class_name(tmp_path: Path) -> None:
    maps, _ = maps_file(tmp_path, count=14)
    assert maps.labels[:4].tolist() == [0, 1, 2, 0]

    assert labels_in(maps, ["cat", "dog", "bee", "ant"])[:4].tolist() == [3, 2, 0, 3]
    with pytest.raises(FeatureError, match=r"maps\.arrow': found class 'bee' \(1 such of 3\)"):
        labels_in(maps, ["ant", "cat"])


def test_an_edge_network_takes_the_k_of_its_file(tmp_path: Path) -> None:
    maps, _ = maps_file(tmp_path)
    edge = make_edge(maps, layers=1)

    assert isinstance(edge, Edge)
    assert edge.options["k"] == 3
