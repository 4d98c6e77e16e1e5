"""The room on disk that a run needs."""

import fnmatch
import os
import shutil
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG

from multitask.job.caches import GB
from multitask.job.groups import Group
from multitask.job.job import Job
from multitask.job.serving import ema_of
from multitask.spec.errors import SpecError
from patches.files import existing_folder

SLOTS = {"adam": 2, "adamw": 2, "rmsprop": 2, "sgd": 1}
"""Optimizer -> buffers of the size of the trained tensors that it keeps."""


def check_room(job: Job) -> None:
    """Check that a new run's checkpoints and versions have room on their disks. What it replaces counts as free.

    Raises:
        SpecError: they have not. The message says what is needed and what is free.
    """
    spec = job.spec
    folders = [(spec.run_directory, version_bytes(job) * 3, "*")]  # best, last, and one that replaces the best
    if "://" not in spec.checkpoint_folder:
        size = checkpoint_bytes(job) * (spec.checkpoints.keep + 1)
        folders.append((Path(spec.checkpoint_folder), size, "checkpoint-*.safetensors"))
    needed: dict[int, int] = {}
    replaced: dict[Path, os.stat_result] = {}
    for named, size, files in folders:
        folder = named.absolute()
        there = existing_folder(folder)  # it may be a disk of its own
        disk = there.stat().st_dev
        needed[disk] = needed.get(disk, 0) + size
        replaced |= _files_in(folder, files)
        free = shutil.disk_usage(there).free
        free += sum(old.st_size for old in replaced.values() if S_ISREG(old.st_mode) and old.st_dev == disk)
        if needed[disk] > free:
            raise SpecError(
                f"'{folder}': the run's checkpoints and versions take {needed[disk] / GB:.3g} GB on this disk, and "
                f"{free / GB:.3g} GB are free. Make room, or name another folder with `directory` or `checkpoints.uri`."
            )


def _files_in(folder: Path, pattern: str) -> dict[Path, os.stat_result]:
    """Return the files at any depth of a folder whose names match a pattern. Others may change it meanwhile."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in fnmatch.filter(names, pattern):
            path = Path(parent, name)
            with suppress(FileNotFoundError):
                found[path] = path.lstat()
    return found


def version_bytes(job: Job) -> int:
    """Return the size of a file of one version: the tensors of all tasks together."""
    return 4 * sum(group.layout.size for group in job.groups.values())


def checkpoint_bytes(job: Job) -> int:
    """Return the size of a checkpoint: the tensors of the groups that training changes, with the optimizer's slots and
    their averages."""

    def size(group: Group) -> int:
        slots = SLOTS[job.spec.optimizer.name] + (ema_of(job.spec, group) is not None)
        return group.layout.size + slots * group.layout.trained

    return 4 * sum(size(group) for group in job.groups.values() if group.layout.pushed)
