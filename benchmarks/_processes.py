"""Find the processes of Ray actors, for benchmarks that kill them. Linux only."""

import contextlib
import os
from pathlib import Path


def own_actors(kind: str) -> list[int]:
    """Return the ids of this process's descendants that are actors of one class, by the title that Ray gives them."""
    parents, found = {}, []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if (path / "cmdline").read_bytes().startswith(f"ray::{kind}".encode()):
                found.append(int(path.name))
    return [process for process in found if os.getpid() in _ancestors(process, parents)]


def _ancestors(process: int, parents: dict[int, int]) -> list[int]:
    return [process, *_ancestors(parents[process], parents)] if process in parents else []
