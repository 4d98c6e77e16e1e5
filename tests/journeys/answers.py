"""Answers photos with an export, in a process that knows nothing of the run.

python -m tests.journeys.answers EXPORT TASK PHOTO...     prints a JSON list with the name of the class of each photo
"""

import json
import sys
from pathlib import Path

import torch

import patches
from multitask.data.transforms import decode, resize_images
from multitask.run.directory import open_export


def main(export: str, task: str, *photos: str) -> None:
    info = patches.inspect_bundle(Path(export) / f"{task}.patch")
    _, models = open_export(Path(export))
    resolution = info.preprocessing["resolution"]
    decoded = [decode(torch.frombuffer(bytearray(Path(photo).read_bytes()), dtype=torch.uint8)) for photo in photos]
    images = resize_images(decoded, [resolution], len(photos))[resolution].permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(info.preprocessing[key])[:, None, None] for key in ("mean", "std"))
    with torch.inference_mode():
        answers = models[task]((images - mean) / std).argmax(dim=1)
    print(json.dumps([info.classes[answer] for answer in answers.tolist()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
