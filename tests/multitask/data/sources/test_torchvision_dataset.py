import hashlib
import io
import pickle
import struct
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from multitask.data import DataError
from multitask.data.sources import torchvision_dataset
from tests.multitask.data.sources.trees import check_source, write_images

RNG = np.random.default_rng(0)


def write_mnist(root: Path) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, rows in (("train", 6), ("t10k", 3)):
        pixels, labels = RNG.integers(0, 256, (rows, 28, 28), np.uint8), np.arange(rows, dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, rows, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, rows) + labels.tobytes())


def pixels(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)))


def check_items(source, reference) -> None:
    """The source is the data set: the same pixels, losslessly, labels and classes."""
    encoded = list(source.read(range(len(reference))))
    for row, (image, label) in enumerate(reference):
        assert encoded[row].startswith(b"\x89PNG")
        np.testing.assert_array_equal(pixels(encoded[row]), np.asarray(image))
        assert source.labels[row] == label
    check_source(source, encoded, source.labels.tolist(), [str(row) for row in range(len(reference))])
    assert source.classes == tuple(reference.classes)


@pytest.mark.parametrize("train", [True, False])
def test_mnist_keeps_every_pixel(tmp_path: Path, train: bool) -> None:
    write_mnist(tmp_path)
    reference = datasets.MNIST(tmp_path, train=train)

    # All ten class names, though the rows here show fewer labels.
    check_items(torchvision_dataset("MNIST", tmp_path, train=train), reference)


def test_cifar10_keeps_every_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch() -> dict:
        return {"data": RNG.integers(0, 256, (2, 3072), np.uint8), "labels": RNG.integers(0, 10, 2).tolist()}

    train = [(f"data_batch_{i}", write(f"data_batch_{i}", batch())) for i in range(1, 6)]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [("test_batch", write("test_batch", batch()))])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": write("batches.meta", {"label_names": names})}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)

    check_items(torchvision_dataset("CIFAR10", tmp_path), datasets.CIFAR10(tmp_path))


def write_flowers(root: Path) -> list[bytes]:
    folder = root / "flowers-102"
    paths = [f"jpg/image_{number:05d}.jpg" for number in range(1, 7)]
    images = write_images(folder, paths)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 5, 6, 7]])})
    savemat(folder / "setid.mat", {"trnid": [[3, 1]], "valid": [[2, 4]], "tstid": [[5, 6]]})
    return images


def test_flowers102_hands_over_its_files(tmp_path: Path) -> None:
    images = write_flowers(tmp_path)

    with patch.object(datasets.Flowers102, "_check_integrity", lambda _: True):
        source = torchvision_dataset("Flowers102", tmp_path, split="train")
        reference = datasets.Flowers102(tmp_path, split="train")

    ids = [f"flowers-102/jpg/image_0000{number}.jpg" for number in (3, 1)]
    check_source(source, [images[2], images[0]], [101, 76], ids)
    assert [label for _, label in reference] == [101, 76]
    assert source.classes == tuple(reference.classes)


def test_a_listed_file_that_is_missing_is_named(tmp_path: Path) -> None:
    write_flowers(tmp_path)
    options = {"split": "test"}
    with patch.object(datasets.Flowers102, "_check_integrity", lambda _: True):
        assert len(torchvision_dataset("Flowers102", tmp_path, **options).labels) == 2
        write_images(tmp_path / "flowers-102", ["jpg/image_00007.jpg"])
        savemat(tmp_path / "flowers-102" / "setid.mat", {"trnid": [[1]], "valid": [[2]], "tstid": [[1, 2, 4, 3, 5]]})
        (tmp_path / "flowers-102" / "jpg" / "image_00002.jpg").unlink()
        with pytest.raises(DataError, match=r"1 of 5 files are missing .* first 'flowers-102/jpg/image_00002.jpg'"):
            torchvision_dataset("Flowers102", tmp_path, **options)


def test_eurosat_and_gtsrb_hand_over_their_files(tmp_path: Path) -> None:
    eurosat = ["AnnualCrop/AnnualCrop_1.jpg", "Forest/Forest_1.jpg", "Forest/Forest_2.jpg"]
    images = write_images(tmp_path / "eurosat" / "2750", eurosat)
    source = torchvision_dataset("EuroSAT", tmp_path)
    check_source(source, images, [0, 1, 1], [f"eurosat/2750/{path}" for path in eurosat])
    assert source.classes == ("AnnualCrop", "Forest")

    gtsrb = ["00000/00000_00000.ppm", "00001/00000_00000.ppm"]
    images = write_images(tmp_path / "gtsrb" / "GTSRB" / "Training", gtsrb)
    source = torchvision_dataset("GTSRB", tmp_path, split="train")
    check_source(source, images, [0, 1], [f"gtsrb/GTSRB/Training/{path}" for path in gtsrb])
    assert source.classes == ("0", "1")


def test_imagenettes_classes_are_its_folders(tmp_path: Path) -> None:
    paths = ["n01440764/ILSVRC2012_val_00000293.JPEG", "n02102040/ILSVRC2012_val_00000665.JPEG"]
    images = write_images(tmp_path / "imagenette2-160" / "val", paths)

    source = torchvision_dataset("Imagenette", tmp_path, split="val", size="160px")

    check_source(source, images, [0, 1], [f"imagenette2-160/val/{path}" for path in paths])
    assert source.classes == ("n01440764", "n02102040")


def write_pets(root: Path) -> None:
    pets = ["Abyssinian_100 1 1 1", "beagle_1 5 2 1", "yorkshire_terrier_9 37 2 25"]
    write_images(root / "oxford-iiit-pet" / "images", [f"{line.split()[0]}.jpg" for line in pets])
    (root / "oxford-iiit-pet" / "annotations").mkdir()
    (root / "oxford-iiit-pet" / "annotations" / "trainval.txt").write_text("\n".join(pets) + "\n")


def test_an_option_that_changes_labels_is_refused(tmp_path: Path) -> None:
    write_pets(tmp_path)
    with pytest.raises(DataError, match="has label 1, but the data set's list says 4"):
        torchvision_dataset("OxfordIIITPet", tmp_path, target_types="binary-category")


def test_what_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Unknown torchvision data set 'CIFAR11'. Did you mean 'CIFAR10"):
        torchvision_dataset("CIFAR11", tmp_path)
    with pytest.raises(DataError, match=r"does not open .* Dataset not found"):
        torchvision_dataset("CIFAR10", tmp_path)
    with pytest.raises(DataError, match="unexpected keyword argument 'split'"):
        torchvision_dataset("CIFAR10", tmp_path, split="train")
    with pytest.raises(DataError, match="download is no option here"):
        torchvision_dataset("CIFAR10", tmp_path, download=True)
    with pytest.raises(DataError, match=r"another order on each machine.*image_folder"):
        torchvision_dataset("Omniglot", tmp_path)
    write_mnist(tmp_path)
    with pytest.raises(DataError, match=r"item 0 is \(ndarray, int\), expected \(PIL image, label\)"):
        torchvision_dataset("MNIST", tmp_path, transform=np.asarray)
    with pytest.raises(DataError, match="item 0 has 2 labels; multi-label is not supported"):
        torchvision_dataset("MNIST", tmp_path, target_transform=lambda label: [label, label])
