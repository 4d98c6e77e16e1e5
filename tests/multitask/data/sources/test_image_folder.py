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


def test_what_tools_leave_behind_is_left_aside_and_counted(tmp_path: Path) -> None:
    images = write_images(tmp_path, ["cats/1.png", "cats/sub/2.png", "dogs/3.png"])
    write_images(
        tmp_path,
        [
            ".ipynb_checkpoints/1-checkpoint.png",
            "__MACOSX/cats/._1.png",
            "cats/._1.png",
            "cats/@eaDir/1.png@SYNOPHOTO_THUMB_M.jpg",
            "cats/sub/.ipynb_checkpoints/2-checkpoint.png",
            ".DS_Store",
            "cats/Thumbs.db",
            "dogs/4.HEIC",
            "dogs/5.heic",
            "dogs/README",
            "6.png",
            "notes.txt",
        ],
    )

    source = image_folder(tmp_path)

    check_source(source, images, [0, 0, 1], ["cats/1.png", "cats/sub/2.png", "dogs/3.png"])
    assert source.classes == ("cats", "dogs")
    assert source.notes == (
        "Left aside: hidden files and folders (6), files .heic (2), files .db (1), files .txt (1), files without an "
        "ending (1), images outside the class folders (1).",
    )


def test_formats_that_are_stored_as_png_are_counted_by_ending(tmp_path: Path) -> None:
    write_images(tmp_path, ["cats/1.png", "cats/2.bmp", "dogs/3.TIF", "dogs/4.bmp"])
    assert image_folder(tmp_path).notes == ("Stored as PNG, which training can read: .bmp (2), .tif (1).",)
    (tmp_path / "cats" / "2.bmp").unlink()
    (tmp_path / "dogs" / "3.TIF").unlink()
    (tmp_path / "dogs" / "4.bmp").rename(tmp_path / "dogs" / "4.jpg")
    assert image_folder(tmp_path).notes == ()


def test_a_link_that_leads_back_adds_no_images(tmp_path: Path) -> None:
    images = write_images(tmp_path, ["cats/1.png", "cats/sub/2.png", "dogs/3.png"])
    for link, goal in (("cats/all", "../cats"), ("cats/a", "sub"), ("dogs/up", ".."), ("here", ".")):
        (tmp_path / link).symlink_to(goal)

    source = image_folder(tmp_path)

    check_source(source, images, [0, 0, 1], ["cats/1.png", "cats/sub/2.png", "dogs/3.png"])
    assert source.notes == ("Left aside: links to a folder that is read already (4).",)


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path: Path) -> None:
    images = write_images(tmp_path, ["root/cats/1.png", "more/2.png"])
    (tmp_path / "root" / "cats" / "more").symlink_to(tmp_path / "more")
    check_source(image_folder(tmp_path / "root"), images, [0, 0], ["cats/1.png", "cats/more/2.png"])


@pytest.mark.parametrize("folders", [("train", "val"), ("Training", "TEST", "meta"), ("train",)])
def test_splits_are_not_taken_for_classes(tmp_path: Path, folders: tuple[str, ...]) -> None:
    write_images(tmp_path, [f"{folder}/{name}/1.png" for folder in folders for name in ("cats", "dogs")])
    with pytest.raises(DataError, match=rf"found the splits .*`{tmp_path}/{folders[0]}` as TABLE/train"):
        image_folder(tmp_path)
    assert image_folder(tmp_path, classes=folders).classes == folders
    assert image_folder(tmp_path / folders[0]).classes == ("cats", "dogs")


def test_a_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    write_images(tmp_path, ["plane/1.png", "train/2.png"])
    assert image_folder(tmp_path).classes == ("plane", "train")


def test_what_is_no_image_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        image_folder(tmp_path / "gone")
    with pytest.raises(DataError, match="found no folders"):
        image_folder(tmp_path)
    write_images(tmp_path, ["cat/1.jpg", "dog/2.jpg"])
    with pytest.raises(DataError, match=r"class folder 'dog'.*Did you mean 'dogs'"):
        image_folder(tmp_path, classes=["cat", "dogs"])
    (tmp_path / "dog" / "2.jpg").rename(tmp_path / "dog" / "2.txt")
    with pytest.raises(DataError, match=r"class folder 'dog' has no image .*found files \.txt \(1\)"):
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
