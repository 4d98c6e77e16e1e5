import os
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from multitask.data import DataError
from multitask.data.sources import image_folder
from multitask.data.sources.image_folder import EXTENSIONS
from tests.multitask.data.sources.trees import check_source, write_images

IMAGENET = [
    "n01440764/n01440764_10026.JPEG",
    "n01440764/n01440764_10027.JPEG",
    "n01443537/n01443537_10007.JPEG",
    "n02012849/sub-a/x.PNG",
    # torchvision sorts whole paths, so that sub-a comes between sub and sub/deep.
    "n02012849/sub/deep/x.jpg",
    "n02012849/sub/x.jpg",
    "n02012849/z.webp",
]


def test_order_and_labels_are_torchvisions(tmp_path: Path) -> None:
    written = dict(zip(IMAGENET, write_images(tmp_path, IMAGENET), strict=True))
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench")
    (tmp_path / "n01440764" / "notes.txt").write_text("no image")
    (tmp_path / "n03126707").symlink_to(tmp_path / "n01443537")
    reference = ImageFolder(tmp_path)
    ids = [os.path.relpath(path, tmp_path) for path, _ in reference.samples]
    assert ids != sorted(ids)

    source = image_folder(tmp_path)

    images = [written[path.replace("n03126707", "n01443537")] for path in ids]
    check_source(source, images, reference.targets, ids)
    assert source.classes == tuple(reference.classes)
    assert source.name == tmp_path.name
    assert EXTENSIONS == IMG_EXTENSIONS


def test_given_classes_keep_their_labels_when_a_folder_is_missing(tmp_path: Path) -> None:
    images = write_images(tmp_path, ["b/1.jpg", "c/2.jpg"])

    source = image_folder(tmp_path, classes=["c", "a", "b"])

    check_source(source, images, [2, 0], ["b/1.jpg", "c/2.jpg"])
    assert source.classes == ("c", "a", "b")


def test_what_is_no_image_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        image_folder(tmp_path / "gone")
    with pytest.raises(DataError, match="found no folders"):
        image_folder(tmp_path)
    write_images(tmp_path, ["cat/1.jpg", "dog/2.jpg"])
    with pytest.raises(DataError, match=r"class folder 'dog'.*Did you mean 'dogs'"):
        image_folder(tmp_path, classes=["cat", "dogs"])
    (tmp_path / "dog" / "2.jpg").rename(tmp_path / "dog" / "2.txt")
    with pytest.raises(DataError, match="class folder 'dog' has no image"):
        image_folder(tmp_path)


def test_a_file_that_vanishes_or_is_empty_is_named(tmp_path: Path) -> None:
    write_images(tmp_path, ["cat/1.jpg", "cat/2.jpg"])
    source = image_folder(tmp_path)
    (tmp_path / "cat" / "1.jpg").unlink()
    (tmp_path / "cat" / "2.jpg").write_bytes(b"")

    with pytest.raises(DataError, match=rf"'cat/1.jpg': cannot read {tmp_path}"):
        list(source.read([0]))
    with pytest.raises(DataError, match=rf"'cat/2.jpg': {tmp_path}/cat/2.jpg is empty"):
        list(source.read([1]))


def test_a_file_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, ["cat/1.jpg"])
    (tmp_path / "cat" / "1.jpg").rename(os.fsdecode(os.fsencode(tmp_path / "cat") + b"/\xff.jpg"))

    with pytest.raises(DataError, match="not valid UTF-8"):
        image_folder(tmp_path)
