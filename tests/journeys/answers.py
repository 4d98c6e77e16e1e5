"""Answers photos with an export, in a process that knows nothing of the run.

python -m tests.journeys.answers EXPORT BATCH_SIZE PHOTO...     prints a JSON list with the logits of each photo
"""

import json
import sys

import torch

import patches


def main(export: str, batch_size: str, *photos: str) -> None:
    torch.set_num_threads(1)  # as the evaluation computes
    bank = patches.open_export(export)
    print(json.dumps([answer.logits.tolist() for answer in bank.predict(photos, batch_size=int(batch_size))]))


if __name__ == "__main__":
    main(*sys.argv[1:])
