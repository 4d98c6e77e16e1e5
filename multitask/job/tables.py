"""The tables that a job's tasks read."""

from collections.abc import Iterator

from multitask.data import Batch, ImageTable, eval_batches, open_table, open_tables
from multitask.spec.schema import TaskSpec
from patches.images.preprocessing import Preprocessing


def open_split(task: TaskSpec, split: str, *, verify: bool = True) -> ImageTable:
    """Open one of a task's tables, and check it as the task's spec says.

    Args:
        split: "train", "validation" or "test".
        verify: whether to compare the table's shards with the index; False for a table that was checked before.
    """
    verify = verify and task.verify_data
    if split == "train" and task.train_on == "train+validation":
        return open_tables(task.data, ("train", "validation"), verify=verify, damaged=task.damaged_shards)
    return open_table(f"{task.data}/{split}", verify=verify, damaged=task.damaged_shards)


def table_key(task: TaskSpec, split: str) -> str:
    """Return a key that is equal for tasks whose split is the same table."""
    return f"{task.data}/{task.train_on if split == 'train' else split}"


def preprocessing(task: TaskSpec) -> Preprocessing:
    """Return how an image becomes the input of the task's model."""
    return Preprocessing(task.resolution, task.mean, task.std, task.resize)


def table_batches(table: ImageTable, task: TaskSpec, rows: int | None = None, threads: int = 1) -> Iterator[Batch]:
    """Read a table in order, in batches that are prepared for the task's model.

    Args:
        rows: number of rows to read, spread evenly over the table; all by default.
        threads: number of threads that decode images.
    """
    return eval_batches(
        table,
        batch_size=task.batch_size,
        resolution=task.resolution,
        mean=task.mean,
        std=task.std,
        resize=task.resize,
        undecodable=task.undecodable,
        rows=rows,
        threads=threads,
    )
