"""What a frozen backbone gives for the images of a table, kept on a disk for later epochs, tasks and runs.

A cache is a folder of Arrow files (`patches.features`), named by a hash of all that its numbers depend on, so that
features of another backbone, table or resolution are never found in it. Any number of processes add files; each file
appears whole. An image that is in no file, or in one that cannot be read, is computed again.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from multitask.data.storage import DataError
from patches.errors import FeatureError
from patches.features import FeatureFile, FeatureLayout, Rows, write_features
from patches.files import remove_left_behind

FILE_BYTES = 1 << 26
"""A file is written when so much is waiting, or something has waited for `WAIT_S`: what a lost process takes along."""
WAIT_S = 30.0
SUFFIX = ".arrow"
NUMBERS_BYTES = 16
"""Row and label of an image."""
MISSING, WAITING = -1, -2
"""In place of the number of the file that an image is in."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachePlan:
    """Where a task's features are to be, and how much they are; picklable."""

    folder: Path
    """That of the caches; the cache is a folder in it."""
    key: Mapping[str, Any]
    """Everything that the numbers depend on; JSON-able."""
    num_rows: int
    row_bytes: int

    @property
    def path(self) -> Path:
        text = json.dumps(self.key, sort_keys=True)
        return self.folder / hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def total_bytes(self) -> int:
        """Of the whole cache, but for a few kB in each file."""
        return self.num_rows * (self.row_bytes + NUMBERS_BYTES)

    def missing_bytes(self) -> int:
        """About what has still to be written: an image that two processes stored at once counts twice."""
        present = sum(path.stat().st_size for path in self.path.glob(f"*{SUFFIX}"))
        return max(0, self.total_bytes - present)

    def free_bytes(self) -> int:
        """On the disk that the folder is, or will be, on."""
        return shutil.disk_usage(self._there()).free

    def disk(self) -> int:
        """Tells disks apart."""
        return self._there().stat().st_dev

    def _there(self) -> Path:
        return next(path for path in (self.folder, *self.folder.parents) if path.exists())

    def open(self) -> "FeatureCache":
        return FeatureCache(self)


class FeatureCache:
    """One process's view of a cache; its threads may share it."""

    def __init__(self, plan: CachePlan) -> None:
        self._plan = plan
        self._lock = threading.Lock()
        self._file_of = np.full(plan.num_rows, MISSING, dtype=np.int32)
        self._place = np.zeros(plan.num_rows, dtype=np.int64)
        self._files: list[FeatureFile] = []
        self._known: set[str] = set()
        self._waiting: list[Rows] = []
        self._waiting_bytes = 0
        self._waiting_since = 0.0

    def read(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], dict[int, Tensor]] | None:
        """Labels (n,) and features of images, if all of them are stored.

        Args:
            rows: shape (n,), numbers in the table.
        Returns:
            The labels, and step -> tensor (n, ...) with the bits and strides that were added; None if one is missing.
        """
        with self._lock:
            if (self._file_of[rows] == WAITING).any():
                self._write()
            if (self._file_of[rows] == MISSING).any():
                self._look()
            numbers, places = self._file_of[rows], self._place[rows]
            if (numbers == MISSING).any():
                return None
            files = {int(number): self._files[number] for number in np.unique(numbers)}
        layouts = next(iter(files.values())).layouts
        features = {name: layout.empty(len(rows)) for name, layout in layouts.items()}
        labels = np.empty(len(rows), dtype=np.int64)
        for number, file in files.items():
            at = np.flatnonzero(numbers == number)
            labels[at] = file.labels[places[at]]
            try:
                for name, feature in features.items():
                    file.read(name, places[at], feature, at.tolist())
            except OSError as error:
                self._forget(number, error)
                return None
        return labels, {int(name): feature for name, feature in features.items()}

    def add(self, rows: NDArray[np.int64], labels: NDArray[np.int64], features: Mapping[int, Tensor]) -> None:
        """Keep what was computed, unless it is there.

        Args:
            rows, labels: shape (n,).
            features: step -> tensor (n, ...).
        Raises:
            DataError: the disk is full, or may not be written.
        """
        with self._lock:
            _, first = np.unique(rows, return_index=True)
            new = np.sort(first[self._file_of[rows[first]] == MISSING])
            if not len(new):
                return
            kept = {str(step): _copy(feature, torch.from_numpy(new)) for step, feature in features.items()}
            if not self._waiting:
                self._waiting_since = time.monotonic()
            self._waiting.append(Rows(rows[new], labels[new], kept))
            self._waiting_bytes += sum(feature.nbytes for feature in kept.values())
            self._file_of[rows[new]] = WAITING
            if self._waiting_bytes >= FILE_BYTES or time.monotonic() - self._waiting_since > WAIT_S:
                self._write()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            DataError: as `add`.
        """
        with self._lock:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            self._look()  # another run may have written the same meanwhile
            self._waiting = [batch for batch in self._waiting if (self._file_of[batch.rows] == WAITING).any()]
            self._waiting_bytes = 0
        if not self._waiting:
            return
        path = self._plan.path / f"{secrets.token_hex(8)}{SUFFIX}"
        try:
            write_features(path, self._plan.key, self._waiting)
            remove_left_behind(path.parent)
        except OSError as error:
            raise DataError(
                f"'{path.parent}': the feature cache cannot be written ({error}). Make room on that disk, or set the "
                "task's cache_features to a folder that can be written."
            ) from error
        for batch in self._waiting:
            self._file_of[batch.rows] = MISSING
        self._waiting = []
        self._take_up(path)

    def _look(self) -> None:
        """Take up the files that are new."""
        if self._plan.path.is_dir():
            for name in sorted(os.listdir(self._plan.path)):
                if name.endswith(SUFFIX) and name not in self._known:
                    self._take_up(self._plan.path / name)

    def _take_up(self, path: Path) -> None:
        self._known.add(path.name)
        try:
            file = FeatureFile(path)
            self._check(file)
        except FeatureError as error:
            log.warning("Left out features, which are computed again: %s", error)
            return
        new = (self._file_of[file.rows] < 0).nonzero()[0]
        self._files.append(file)
        self._file_of[file.rows[new]] = len(self._files) - 1
        self._place[file.rows[new]] = new

    def _check(self, file: FeatureFile) -> None:
        """Raises:
        FeatureError: the file was put here from another cache.
        """
        mine = json.loads(json.dumps(self._plan.key))
        if file.about != mine:
            other = sorted(key for key in mine.keys() | file.about.keys() if mine.get(key) != file.about.get(key))
            raise FeatureError(f"'{file.path}' holds features of another {' and '.join(other)}. Take the file away.")
        if self._files and file.layouts != self._files[0].layouts:
            raise FeatureError(f"'{file.path}' holds features of another shape or order. Take the file away.")

    def _forget(self, number: int, error: OSError) -> None:
        log.warning("A file of the feature cache is gone, and its features are computed again: %s", error)
        with self._lock:
            self._file_of[self._file_of == number] = MISSING


def _copy(feature: Tensor, chosen: Tensor) -> Tensor:
    """Some images of a batch, with its strides."""
    return FeatureLayout.of(feature).empty(len(chosen)).copy_(feature.detach()[chosen.to(feature.device)])
