"""The program that a submitted job runs on its cluster: `python -m jobs.submitted STORAGE VERB ARGUMENTS`.

It reads the tokens that were sent with the job, checks that all nodes see the storage, and runs
`multitask VERB ARGUMENTS`.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs import cli
from jobs.package import TOKENS
from multitask.cluster.session import ray_session

LOOK_TIMEOUT_S = 1800.0
"""Time in which every node must answer; a node answers only when it has installed the job's packages."""


def main() -> None:
    storage, *arguments = sys.argv[1:]
    take_tokens(Path(TOKENS))
    with ray_session():
        try:
            check_storage(Path(storage))
        except RuntimeError as error:
            sys.exit(f"error: {error}")
        sys.argv = ["multitask", *arguments]
        cli.main()


def take_tokens(file: Path) -> None:
    """Put the forwarded tokens into the environment of this process, and nowhere else."""
    if file.is_file():
        os.environ.update(json.loads(file.read_text()))


def check_storage(storage: Path) -> None:
    """Write a file into the storage, and let every node of the cluster look for it.

    Raises:
        RuntimeError: the folder cannot be written, or a node does not see the file.
    """
    try:
        storage.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".seen-by-all-nodes-", dir=storage) as file:
            blind = nodes_without(Path(file.name))
    except OSError as error:
        raise RuntimeError(f"--storage {storage} cannot be written here: {error}. Mount it on every node.") from error
    if blind:
        raise RuntimeError(
            f"--storage {storage} is not the same folder on all nodes: a file that was written there is missing on "
            f"{', '.join(blind)}. Mount one file system (NFS, EFS, a ReadWriteMany volume) at this path on every node."
        )


def nodes_without(file: Path) -> list[str]:
    """Return the addresses of the cluster's nodes that do not see a file."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    look: Any = ray.remote(num_cpus=0)(_sees)
    looks = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(file)
        for node in nodes
    ]
    seen = ray.get(looks, timeout=LOOK_TIMEOUT_S)
    return [node["NodeManagerAddress"] for node, sees in zip(nodes, seen, strict=True) if not sees]


def _sees(file: Path) -> bool:
    return file.exists()


if __name__ == "__main__":
    main()
