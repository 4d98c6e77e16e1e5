"""Image tables on Arrow. They are written once as Parquet shards and read as tensors at any resolution."""

from multitask.data.batches import Batch, TrainBatches, eval_batches, prefetch
from multitask.data.format import Row, write_table
from multitask.data.storage import DataError
from multitask.data.table import ImageTable, open_table, open_tables

__all__ = [
    "Batch",
    "DataError",
    "ImageTable",
    "Row",
    "TrainBatches",
    "eval_batches",
    "open_table",
    "open_tables",
    "prefetch",
    "write_table",
]
