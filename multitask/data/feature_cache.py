"""The feature cache: outputs of a frozen backbone for the images of a table, kept on a disk.

Later epochs, tasks and runs read these features and do not compute them again. A cache is a folder of Arrow files
(`patches.features`). The name of the folder is a hash of everything that the features depend on, so features of another
backbone, table or resolution lie in another folder. Several processes may add files at the same time; each file appears
complete. An image is computed again if no readable file contains it.
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
from patches.files import existing_folder, remove_left_behind

FILE_BYTES = 1 << 26
"""Bytes of features in memory at which a file is written. A process that dies loses at most this much work."""
WAIT_S = 30.0
"""Seconds after which a file is written even if it is smaller."""
SUFFIX = ".arrow"
NUMBERS_BYTES = 16
"""Bytes of the row and the label of an image."""
MISSING, WAITING = -1, -2
"""Marks of an image that is in no file yet: its features are unknown, or they wait in memory to be written."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachePlan:
    """Where the features of a task are stored, and how many bytes they need. It can be pickled."""

    folder: Path
    """Folder of all caches. This cache is a folder inside it."""
    key: Mapping[str, Any]
    """Everything that the features depend on, as values that JSON can represent."""
    num_rows: int
    """Number of rows of the table."""
    row_bytes: int
    """Bytes of the features of one image."""

    @property
    def path(self) -> Path:
        """Folder of this cache."""
        text = json.dumps(self.key, sort_keys=True)
        return self.folder / hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def total_bytes(self) -> int:
        """Size of the complete cache, except for a few kB in each file."""
        return self.num_rows * (self.row_bytes + NUMBERS_BYTES)

    def missing_bytes(self) -> int:
        """Return about how many bytes are still to be written. An image that two processes stored is counted twice."""
        present = sum(path.stat().st_size for path in self.path.glob(f"*{SUFFIX}"))
        return max(0, self.total_bytes - present)

    def free_bytes(self) -> int:
        """Return the free bytes on the disk on which the folder is, or will be created."""
        return shutil.disk_usage(existing_folder(self.folder)).free

    def disk(self) -> int:
        """Return a number that differs between disks."""
        return existing_folder(self.folder).stat().st_dev

    def open(self) -> "FeatureCache":
        """Return the cache, for use in this process."""
        return FeatureCache(self)


class FeatureCache:
    """A cache as one process uses it. Threads of the process may share it."""

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
        """Return labels and features of images if all of them are stored.

        Args:
            rows: numbers of the images in the table, shape (n,).
        Returns:
            The labels, shape (n,), and step -> tensor of shape (n, ...), with the bits and strides that were added.
            None if an image is missing.
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
        """Store the features of images that the cache does not contain yet.

        Args:
            rows: numbers of the images in the table, shape (n,).
            labels: shape (n,).
            features: step -> tensor of shape (n, ...).
        Raises:
            DataError: the disk is full or cannot be written.
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
        """Write all features that wait in memory.

        Raises:
            DataError: the disk is full or cannot be written.
        """
        with self._lock:
            self._write()

    def _write(self) -> None:
        """Write the waiting features to a new file. The caller holds the lock."""
        if self._waiting:
            self._look()  # another run may have written the same features meanwhile
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
        """Open the files that were added since the last call."""
        if self._plan.path.is_dir():
            for name in sorted(os.listdir(self._plan.path)):
                if name.endswith(SUFFIX) and name not in self._known:
                    self._take_up(self._plan.path / name)

    def _take_up(self, path: Path) -> None:
        """Open a file and note which images it contains. A file that does not fit is skipped with a warning."""
        self._known.add(path.name)
        try:
            file = FeatureFile(path)
            self._check(file)
        except FeatureError as error:
            log.warning("A file of the feature cache is not used, and its features are computed again: %s", error)
            return
        new = (self._file_of[file.rows] < 0).nonzero()[0]
        self._files.append(file)
        self._file_of[file.rows[new]] = len(self._files) - 1
        self._place[file.rows[new]] = new

    def _check(self, file: FeatureFile) -> None:
        """Check that a file belongs to this cache.

        Raises:
            FeatureError: the file comes from another cache.
        """
        mine = json.loads(json.dumps(self._plan.key))
        if file.about != mine:
            other = sorted(key for key in mine.keys() | file.about.keys() if mine.get(key) != file.about.get(key))
            raise FeatureError(f"'{file.path}' holds features of another {' and '.join(other)}. Delete the file.")
        if self._files and file.layouts != self._files[0].layouts:
            raise FeatureError(
                f"'{file.path}' holds features of another shape or memory order than the other files of this cache. "
                "Delete the file."
            )

    def _forget(self, number: int, error: OSError) -> None:
        """Note that a file has disappeared, so that its images count as missing."""
        log.warning("A file of the feature cache is gone, and its features are computed again: %s", error)
        with self._lock:
            self._file_of[self._file_of == number] = MISSING


def _copy(feature: Tensor, chosen: Tensor) -> Tensor:
    """Copy some images of a batch, with the strides of the batch."""
    return FeatureLayout.of(feature).empty(len(chosen)).copy_(feature.detach()[chosen.to(feature.device)])
