"""The job spec's keys for a run's processes, its checkpoints and its tracking."""

from typing import Literal, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from multitask.spec.fields import STRICT, Amount, Count, PathText, Rate


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointsSpec:
    """When and where the run's checkpoints are saved."""

    uri: PathText | None = None
    """Folder for the checkpoints: a path or a pyarrow filesystem URI; checkpoints/ in the run directory by default."""
    every_minutes: Rate | None = 10.0
    """Number of minutes between checkpoints; with null, time does not count."""
    every_rounds: Count | None = None
    """Number of rounds between checkpoints; without it only time counts. Both keys may be set."""
    keep: Count = 2
    """Number of checkpoints that are kept; older ones are deleted."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ResourcesSpec:
    cpus_per_worker: Rate | None = None
    """CPUs that each worker reserves. By default all workers get an equal share of the cluster's CPUs: at most one, and
    small enough that every worker fits on a node."""
    gpus_per_worker: Amount = 0.0
    """GPUs that each worker reserves. With a number below 1 several workers share one GPU."""
    placement: Literal["spread", "pack"] | None = None
    """Where the workers and the server's shards go: `spread` uses as many nodes as possible, `pack` as few as possible.
    By default Ray finds a place for each worker separately; if a task has `resources` or `labels`, the default is
    `spread`."""
    threads_per_worker: Count = 1
    """Number of threads with which torch computes in each worker."""
    decode_threads: Count = 1
    """Number of threads that decode images for a worker, or for all workers of a node that share the decoded images."""
    start_timeout_s: Rate = 300.0
    """Seconds that the workers may take to start. After that the job fails and names the workers that are missing."""
    step_timeout_s: Rate = 600.0
    """Seconds that a worker may be silent before it counts as lost. The time in which it waits for other workers does
    not count. While workers share a process, the limit is multiplied by the number of workers in the fullest
    process."""

    @model_validator(mode="after")
    def _gpus_are_whole_or_shared(self) -> Self:
        if self.gpus_per_worker > 1 and not self.gpus_per_worker.is_integer():
            raise ValueError(
                f"gpus_per_worker is {self.gpus_per_worker:g}; Ray gives a share of one GPU, or whole GPUs: set at "
                "most 1, or a whole number"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackingSpec:
    uri: PathText | None = None
    """MLflow tracking URI; by default the SQLite file mlflow.db beside the run directories."""
    experiment: str = "multitask"
    """Name of the MLflow experiment, which is created if it is missing."""
