"""The training streams of a job: which workers can share one, and how a stream is built."""

from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from typing import Any

from multitask.data import ImageTable
from multitask.data.feature_cache import FeatureCache
from multitask.data.stream import TrainStream
from multitask.job.assignment import rank_of
from multitask.job.tables import table_key
from multitask.spec.schema import JobSpec, TaskSpec


def group_by_rows(
    workers: Iterable[str],
    tasks: Mapping[str, TaskSpec],
    classes: Mapping[str, tuple[str, ...]],
    cached: Container[str],
) -> list[list[str]]:
    """Put workers that read the same rows in the same order into one list; their resolutions may differ.

    A worker with a feature cache gets a list of its own, because the images that it needs depend on the stored
    features.

    Args:
        tasks: worker -> its task.
        classes: task -> its class list, which gives its labels.
        cached: names of the tasks that have a feature cache.
    """
    groups: dict[Any, list[str]] = {}
    for name in workers:
        task = tasks[name]
        rows = table_key(task, "train")
        labels = classes[task.name]
        chosen = (task.batch_size, task.workers, rank_of(name), task.sampling, task.shuffle_window)
        changed = (task.augment, task.undecodable)
        alone = name if task.name in cached else None
        groups.setdefault((rows, labels, chosen, changed, alone), []).append(name)
    return list(groups.values())


def stream_factory(
    spec: JobSpec, task: TaskSpec, rank: int, table: ImageTable, cache: FeatureCache | None, decode_cached: bool
) -> Callable[[int], TrainStream]:
    """Return a function that opens the training stream of a worker at a position.

    Args:
        rank: the worker's number among the workers of its task.
        cache: the task's feature cache.
        decode_cached: whether the task's model reads images as well as stored features.
    """
    make = partial(
        TrainStream,
        table,
        batch_size=task.batch_size,
        seed=spec.seed,
        augment=task.augment,
        sampling=task.sampling,
        rank=rank,
        workers=task.workers,
        undecodable=task.undecodable,
        window=task.shuffle_window,
        threads=spec.resources.decode_threads,
        cache=cache,
        decode_cached=decode_cached,
    )
    return lambda position: make(start=position)
