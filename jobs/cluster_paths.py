"""What the paths of a job mean on a cluster: there it has what git tracks, what has a URI, and one shared folder."""

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHT_FILES = (".safetensors", ".pth")


class PathError(ValueError):
    """A path that the nodes of a cluster do not share; the message names the setting and says what to do."""


@dataclass(frozen=True)
class ClusterPaths:
    """Turns paths of this machine into those of a cluster, or refuses them."""

    project: Path
    tracked: frozenset[str]
    """Paths of files within the project."""
    storage: Path
    """A folder that all nodes see at this path."""

    def __post_init__(self) -> None:
        if "://" in str(self.storage) or not self.storage.is_absolute():
            raise PathError(
                f"--storage is '{self.storage}', expected a folder that every node has at the same absolute path, such "
                "as /shared, where NFS, EFS or a ReadWriteMany volume is mounted."
            )

    def job(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """A job spec as plain data, for the cluster.

        What it reads has to be tracked, a URI, or an absolute path, which the nodes then must have. What it writes has
        to be a URI or in the storage; a run directory elsewhere becomes STORAGE/NAME.

        Raises:
            PathError: a path stays on this machine.
        """
        job = dict(content)
        job["directory"] = self.directory(job)
        job["tasks"] = [
            {**task, "data": self._read(f"data of task '{task['name']}'", task["data"])} for task in job["tasks"]
        ]
        for task in job["tasks"]:
            self._check_cache(task)
        weights = job["backbone"].get("weights")
        if weights is not None and weights.endswith(WEIGHT_FILES):
            job["backbone"] = {**job["backbone"], "weights": self._read("backbone.weights", weights)}
        for section in ("checkpoints", "tracking"):
            uri = (job.get(section) or {}).get("uri")
            path = None if uri is None else _on_disk(uri)
            if path is not None and not self._in_storage(path):
                raise PathError(
                    f"{section}.uri is '{uri}', on one node's own disk; the job's processes are on several nodes, and "
                    f"these come and go. Name a path in {self.storage}, or a URI that every node reaches."
                )
        return job

    def sweep(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """A sweep spec as plain data, for the cluster: its job as `job` has it, STORAGE/NAME unless in the storage.

        Raises:
            PathError: a path stays on this machine.
        """
        # A sweep names its trials and their directories itself.
        job = self.job({**content["job"], "name": content["name"]})
        del job["name"], job["directory"]
        sweep = {**content, "job": job, "directory": self.directory(content)}
        if content.get("source") is not None:
            sweep["source"] = self.argument("source", content["source"])
        return sweep

    def directory(self, content: Mapping[str, Any]) -> str:
        """Where a run, or a sweep, writes: its own directory if that is in the storage."""
        named = content.get("directory")
        return named if named is not None and self._in_storage(named) else str(self.storage / content["name"])

    def argument(self, name: str, path: str) -> str:
        """A verb's argument that is a path, for the cluster.

        Raises:
            PathError: it is neither tracked nor in the storage.
        """
        found = self._within_project(path)
        if found is not None:
            return found
        if self._in_storage(path):
            return path
        raise PathError(
            f"{name} is '{path}', which the job would not find, or would lose with its last process: on the cluster it "
            f"has what git tracks, and {self.storage}. Name a path in {self.storage}."
        )

    def _read(self, what: str, path: str) -> str:
        found = path if "://" in path else self._within_project(path)
        if found is not None:
            return found
        if Path(path).is_absolute():
            return path
        raise PathError(
            f"{what} is '{path}', which git does not track, so it does not travel. Put it where every node reads it, "
            f"and name that URI (s3://bucket/table) or path ({self.storage}/...)."
        )

    def _check_cache(self, task: Mapping[str, Any]) -> None:
        path = task.get("cache_features")
        if path is not None and (not Path(path).is_absolute() or Path(path).is_relative_to(self.project)):
            raise PathError(
                f"cache_features of task '{task['name']}' is '{path}', in the job's copy of the project, which goes "
                "with the job. Name an absolute path on the nodes' own disks, such as /tmp/features."
            )

    def _within_project(self, path: str) -> str | None:
        """The path as the project's copy has it, if git tracks it or something in it."""
        whole = Path(path).resolve()
        if not whole.is_relative_to(self.project):
            return None
        name = whole.relative_to(self.project).as_posix()
        return name if any(file == name or file.startswith(f"{name}/") for file in self.tracked) else None

    def _in_storage(self, path: str) -> bool:
        return Path(posixpath.normpath(path)).is_relative_to(self.storage)


def _on_disk(uri: str) -> str | None:
    """The path that a URI stands for; None for a server or an object store."""
    for scheme in ("sqlite:///", "file://"):
        if uri.startswith(scheme):
            return uri.removeprefix(scheme)
    return None if "://" in uri or uri.startswith("databricks") else uri
