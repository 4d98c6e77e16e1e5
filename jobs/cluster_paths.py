"""Translates the paths of a job for a cluster.

On a cluster, a job has the files that git tracks, data at URIs, and one folder that all nodes share.
"""

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHT_FILES = (".safetensors", ".pth")


class PathError(ValueError):
    """A path cannot be used on a cluster; the message names the setting and says what to do."""


@dataclass(frozen=True)
class ClusterPaths:
    """Turns paths of this machine into paths of a cluster, or refuses them."""

    project: Path
    """The project's folder on this machine."""
    tracked: frozenset[str]
    """Files that git tracks, as paths relative to `project`."""
    storage: Path
    """A folder that all nodes have at this path."""

    def __post_init__(self) -> None:
        if "://" in str(self.storage) or not self.storage.is_absolute():
            raise PathError(
                f"--storage is '{self.storage}', expected a folder that every node has at the same absolute path, such "
                "as /shared, where NFS, EFS or a ReadWriteMany volume is mounted."
            )

    def job(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return a job spec with its paths translated for the cluster.

        A path that the job reads has to be tracked by git, a URI, or an absolute path, which the nodes must then have.
        A path that the job writes has to be a URI or in the storage; a run directory elsewhere becomes STORAGE/NAME.

        Args:
            content: the job spec as plain data.
        Raises:
            PathError: the nodes would not have a path, or would lose what is written there.
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
                    f"{section}.uri is '{uri}', on the disk of a single node, but the job's processes run on several "
                    f"nodes, which may be replaced. Name a path in {self.storage}, or a URI that every node reaches."
                )
        return job

    def sweep(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return a sweep spec with its paths translated for the cluster, those of its job as `job` does it.

        A directory outside the storage becomes STORAGE/NAME.

        Args:
            content: the sweep spec as plain data.
        Raises:
            PathError: the nodes would not have a path, or would lose what is written there.
        """
        # `job` needs a name, but the job of a sweep has none: the sweep itself names its trials and their directories.
        job = self.job({**content["job"], "name": content["name"]})
        del job["name"], job["directory"]
        sweep = {**content, "job": job, "directory": self.directory(content)}
        if content.get("source") is not None:
            sweep["source"] = self.argument("source", content["source"])
        return sweep

    def directory(self, content: Mapping[str, Any]) -> str:
        """Return the directory that a run or sweep names if that is in the storage, else STORAGE/NAME."""
        named = content.get("directory")
        return named if named is not None and self._in_storage(named) else str(self.storage / content["name"])

    def argument(self, name: str, path: str) -> str:
        """Return a path on a verb's command line as the cluster needs it.

        Args:
            name: the argument's name, for the error message.
        Raises:
            PathError: the path is neither tracked by git nor in the storage.
        """
        found = self._within_project(path)
        if found is not None:
            return found
        if self._in_storage(path):
            return path
        raise PathError(
            f"{name} is '{path}', which the job would not find on the cluster, or would lose at its end: it has only "
            f"the files that git tracks, and {self.storage}. Name a path in {self.storage}."
        )

    def _read(self, what: str, path: str) -> str:
        found = path if "://" in path else self._within_project(path)
        if found is not None:
            return found
        if Path(path).is_absolute():
            return path
        raise PathError(
            f"{what} is '{path}', which git does not track, so it is not sent to the cluster. Put it where every node "
            f"can read it, and name that URI (s3://bucket/table) or path ({self.storage}/...)."
        )

    def _check_cache(self, task: Mapping[str, Any]) -> None:
        path = task.get("cache_features")
        if path is not None and (not Path(path).is_absolute() or Path(path).is_relative_to(self.project)):
            raise PathError(
                f"cache_features of task '{task['name']}' is '{path}', in the job's copy of the project, which is "
                "deleted with the job. Name an absolute path on the nodes' own disks, such as /tmp/features."
            )

    def _within_project(self, path: str) -> str | None:
        """Return a path relative to the project if git tracks it or a file in it, else None."""
        whole = Path(path).resolve()
        if not whole.is_relative_to(self.project):
            return None
        name = whole.relative_to(self.project).as_posix()
        return name if any(file == name or file.startswith(f"{name}/") for file in self.tracked) else None

    def _in_storage(self, path: str) -> bool:
        return Path(posixpath.normpath(path)).is_relative_to(self.storage)


def _on_disk(uri: str) -> str | None:
    """Return the path that a URI stands for, or None if it stands for a server or an object store."""
    for scheme in ("sqlite:///", "file://"):
        if uri.startswith(scheme):
            return uri.removeprefix(scheme)
    return None if "://" in uri or uri.startswith("databricks") else uri
