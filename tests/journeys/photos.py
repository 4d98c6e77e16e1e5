"""Photos as people have them: one side of each is bright, and the name of the class says which."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("bright left", "bright right", "bright top")
SIDE = 24
"""Height and width of a photo as it is shown, in pixels."""
TURNED_RIGHT = 6
"""The EXIF orientation of a camera that was held upright: the stored pixels are to be turned by 90 degrees."""
KINDS = ("jpg", "turned.jpg", "alpha.png", "grey.png", "deep.png", "webp")


def write_photos(folder: Path, each: int, seed: int = 0) -> None:
    """Write photos of all kinds, and one that is cut off, into one folder for each class.

    Args:
        each: number of photos of each kind in each class.
    """
    chance = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for kind in KINDS:
            for number in range(each):
                write_photo(folder / name / f"{number:02d}.{kind}", name, chance)
    whole = (folder / CLASSES[0] / "00.jpg").read_bytes()
    (folder / CLASSES[0] / "cut off.jpg").write_bytes(whole[: len(whole) // 3])
    (folder / ".DS_Store").write_bytes(b"not a photo")


def write_photo(path: Path, name: str, chance: np.random.Generator) -> None:
    """Write one photo in the format that its name says."""
    shown = chance.uniform(0, 80, (SIDE, SIDE))
    half = {"left": np.s_[:, : SIDE // 2], "right": np.s_[:, SIDE // 2 :], "top": np.s_[: SIDE // 2]}
    shown[half[name.split()[1]]] += 150
    grey = shown.astype(np.uint8)
    colour = np.stack([grey] * 3, axis=-1)
    match path.name.partition(".")[2]:
        case "turned.jpg":
            exif = Image.Exif()
            exif[0x0112] = TURNED_RIGHT
            Image.fromarray(np.rot90(colour).copy()).save(path, exif=exif, quality=95)
        case "alpha.png":
            Image.fromarray(np.dstack([colour, np.full_like(grey, 200)])).save(path)
        case "grey.png":
            Image.fromarray(grey).save(path)
        case "deep.png":
            Image.fromarray(grey.astype(np.uint16) * 257).save(path)
        case _:
            Image.fromarray(colour).save(path, quality=95)
